"""Plan: what each rank will hold and how fast it can be, before anything is read. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from parallel.checkpoint.layout import Layout
from parallel.checkpoint.source import DTYPE_BYTES
from parallel.errors import ModelError
from parallel.model.placements import EMBEDDING, HEAD
from parallel.placement import index_shape


@dataclass(frozen=True)
class RankPlan:
    """Bytes of the rank that holds the most, at one tensor-parallel size.

    Attributes:
        linear_bytes, embedding_bytes, other_bytes: weights by kind; lm_head is an embedding here.
        kv_cache_bytes: for the batch and length of the plan.
        temporary_bytes: the largest temporaries of a prefill step.
        read_bytes: what one decode step reads: the weights but the embedding's other rows, and
            the KV cache at half its length.
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
    """

    batch_size: int
    max_length: int
    prefill_chunk: int
    dtype: str


def plan_rank(layout: Layout, tp: int, workload: Workload) -> RankPlan:
    """Count the bytes of the fullest rank.

    Raises:
        ModelError: the heads cannot be dealt out to `tp` ranks.
    """
    layout.check_tp(tp)
    rank = max(range(tp), key=lambda rank: layout.rank_bytes(rank, tp, workload.dtype))
    linear, embedding, other = _weights_by_kind(layout, rank, tp, workload.dtype)
    kv_cache = kv_cache_bytes(layout, tp, workload)
    embedding_rows = _bytes_of(layout, EMBEDDING, rank, tp, workload.dtype)
    # A tied embedding is read whole, as lm_head; an untied one only at the token's row.
    head_rows = (
        0 if HEAD in layout.table else _bytes_of(layout, EMBEDDING, 0, 1, workload.dtype) // tp
    )
    unread = max(0, embedding_rows - head_rows)
    return RankPlan(
        tp=tp,
        linear_bytes=linear,
        embedding_bytes=embedding,
        other_bytes=other,
        kv_cache_bytes=kv_cache,
        temporary_bytes=temporary_bytes(layout, tp, workload),
        read_bytes=linear + embedding + other - unread + kv_cache // 2,
    )


def kv_cache_bytes(layout: Layout, tp: int, workload: Workload) -> int:
    """Of the batch at its full length."""
    tokens = workload.batch_size * workload.max_length
    return tokens * kv_position_bytes(layout, tp, workload.dtype)


def kv_position_bytes(layout: Layout, tp: int, dtype: str) -> int:
    """One position's keys and values of every layer for a rank's kv heads, as they are cached; a
    replicated head counts on each rank."""
    config = layout.config
    heads = max(1, config.num_key_value_heads // tp)
    entry = layout.scheme.kv_bytes(config.head_dim, DTYPE_BYTES[dtype])
    return 2 * config.num_hidden_layers * heads * entry


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
    channel of a query at each position that it attends to, half of the prompt.
    """
    config = layout.config
    weights = sum(
        math.prod(row.shape) for row in layout.table.values() if row.is_linear and row.name != HEAD
    )
    channels = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return (2 * weights + 4 * channels * (length // 2)) // tp


def unsupported_reason(layout: Layout, tp: int) -> str | None:
    """Why a size does not work, in a sentence, or None."""
    try:
        layout.check_tp(tp)
    except ModelError as error:
        return str(error)
    return None


def _weights_by_kind(layout: Layout, rank: int, tp: int, dtype: str) -> tuple[int, int, int]:
    linear = embedding = other = 0
    for tensor, count in layout.kinds:
        num_bytes = count * tensor.num_bytes(rank, tp, dtype)
        if tensor.row.name in (EMBEDDING, HEAD):
            embedding += num_bytes
        elif tensor.row.is_linear:
            linear += num_bytes
        else:
            other += num_bytes
    return linear, embedding, other


def _bytes_of(layout: Layout, name: str, rank: int, tp: int, dtype: str) -> int:
    parts = layout.parts[name]
    return sum(part.num_bytes(rank, tp, dtype) for part in parts)
