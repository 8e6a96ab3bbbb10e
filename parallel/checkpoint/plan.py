"""Plan: what each rank will hold and how fast it can be, before anything is read. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from parallel.checkpoint.layout import Layout
from parallel.checkpoint.memory import Memory
from parallel.checkpoint.source import DTYPE_BYTES
from parallel.errors import ModelError
from parallel.model.placements import HEAD
from parallel.model.windows import positions_seen
from parallel.placement import index_shape
from quant.packing import Packing


@dataclass(frozen=True)
class RankPlan:
    """Bytes of the rank that holds the most, at one tensor-parallel size.

    Attributes:
        linear_bytes, embedding_bytes, other_bytes: weights by kind; lm_head is an embedding here.
        kv_cache_bytes: for the batch and length of the plan.
        temporary_bytes: the largest temporaries of a prefill step.
        read_bytes: what a decode step reads: the weights but the embedding's other rows, and of the KV
            cache what the queries see, on average over the plan's length: half of it, or windows.
    """

    tp: int
    linear_bytes: int
    embedding_bytes: int
    other_bytes: int
    kv_cache_bytes: int
    temporary_bytes: int
    read_bytes: int

    @property
    def weight_bytes(self) -> int:
        return self.linear_bytes + self.embedding_bytes + self.other_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_cache_bytes + self.temporary_bytes

    def tokens_per_s(self, bandwidth_gb_s: float, batch_size: int) -> float:
        """The most a decode can reach that reads each byte once at that bandwidth."""
        return batch_size * bandwidth_gb_s * 1e9 / self.read_bytes


@dataclass(frozen=True)
class Workload:
    """What is counted for.

    Attributes:
        dtype: the compute dtype: of the KV cache, the temporaries, and weights left unquantized.
        packing: of the quantized weights.
    """

    batch_size: int
    max_length: int
    prefill_chunk: int
    dtype: str
    packing: Packing = Packing()


def plan_rank(layout: Layout, tp: int, workload: Workload) -> RankPlan:
    """Count the bytes of the fullest rank.

    Raises:
        ModelError: the heads cannot be dealt out to `tp` ranks.
    """
    layout.check_tp(tp)
    memory = Memory(layout, workload.dtype, workload.packing)
    rank = max(range(tp), key=lambda rank: memory.weight_bytes(rank, tp))
    linear, embedding, other = memory.bytes_by_kind(rank, tp)
    seen = positions_seen(layout.config.windows, 0, workload.max_length)
    cached = workload.batch_size * seen * kv_position_bytes(layout, tp, workload.dtype)
    return RankPlan(
        tp=tp,
        linear_bytes=linear,
        embedding_bytes=embedding,
        other_bytes=other,
        kv_cache_bytes=kv_cache_bytes(layout, tp, workload),
        temporary_bytes=temporary_bytes(layout, tp, workload),
        read_bytes=memory.read_bytes(rank, tp) + cached // workload.max_length,
    )


def kv_cache_bytes(layout: Layout, tp: int, workload: Workload) -> int:
    """Of the batch at its full length, whatever the windows: the cache keeps every position."""
    positions = workload.batch_size * workload.max_length * layout.config.num_hidden_layers
    return positions * kv_position_bytes(layout, tp, workload.dtype)


def kv_position_bytes(layout: Layout, tp: int, dtype: str) -> int:
    """One position's keys and values of a layer for a rank's kv heads, as they are cached; a replicated
    head counts on each rank."""
    config = layout.config
    heads = max(1, config.num_key_value_heads // tp)
    entry = layout.scheme.kv_bytes(config.head_dim, DTYPE_BYTES[dtype])
    return 2 * heads * entry


def temporary_bytes(layout: Layout, tp: int, workload: Workload) -> int:
    """What a prefill step holds at once beside the weights: an estimate, from above.

    The residual and the normed stream, the widest of q k v and gate up, the partial sums in
    float32, the attention mask in float32, the logits of the batch, and of an int8 KV cache the
    keys and values of one sequence as floats.
    """
    config = layout.config
    tokens = min(workload.prefill_chunk, workload.batch_size * workload.max_length)
    width = DTYPE_BYTES[workload.dtype]
    ffn = _widest_ffn(layout, tp)
    heads = config.num_attention_heads // tp * config.head_dim
    stream = tokens * config.hidden_size * (3 * width + 3 * 4)
    wide = tokens * max(3 * ffn, 6 * heads) * max(width, 4)
    mask = tokens * workload.max_length * 5
    logits = workload.batch_size * config.vocab_size * 4 * 2
    kv_heads = max(1, config.num_key_value_heads // tp) * config.head_dim
    run = 2 * kv_heads * workload.max_length * (width + 4) if layout.scheme.kv_granularity else 0
    return stream + wide + mask + logits + run


def _widest_ffn(layout: Layout, tp: int) -> int:
    """The most neurons that a rank has of a layer."""
    rows = {
        (row.shape, row.placement)
        for name, row in layout.table.items()
        if name.endswith("down_proj.weight")
    }
    return max(
        index_shape(placement.index(shape, rank, tp))[1]
        for shape, placement in rows
        for rank in range(tp)
    )


def prefill_flops(layout: Layout, tp: int, length: int) -> int:
    """Multiplications and additions of a rank for each token of a prompt of `length`, on average.

    Two for each weight of a linear but lm_head, which sees last positions only, and four for each
    channel of a query at each position that it attends to: half of the prompt, or its window.
    """
    config = layout.config
    weights = sum(
        math.prod(row.shape) for row in layout.table.values() if row.is_linear and row.name != HEAD
    )
    channels = config.num_attention_heads * config.head_dim
    attention = 4 * channels * positions_seen(config.windows, 0, length) // length
    return (2 * weights + attention) // tp


def unsupported_reason(layout: Layout, tp: int) -> str | None:
    """Why a size does not work, in a sentence, or None."""
    try:
        layout.check_tp(tp)
    except ModelError as error:
        return str(error)
    return None
