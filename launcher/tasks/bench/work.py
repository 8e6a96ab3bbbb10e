"""What a case must read and compute, counted from the shapes. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from launcher.schema import Config
from parallel.checkpoint.layout import Layout
from parallel.checkpoint.memory import Memory
from parallel.checkpoint.plan import kv_position_bytes
from parallel.model.placements import HEAD
from parallel.model.windows import positions_seen


@dataclass(frozen=True)
class Case:
    """One row of a bench.

    Attributes:
        chunk: most tokens of one prefill step.
    """

    batch_size: int
    prompt_length: int
    new_tokens: int
    chunk: int

    @property
    def length(self) -> int:
        """Positions of a sequence in the cache."""
        return self.prompt_length + self.new_tokens


@dataclass(frozen=True)
class Work:
    """Of one phase, over the ranks that are measured.

    Attributes:
        tokens: that go in (prefill) or come out (decode), of all sequences.
        num_bytes: weights once a step, and in decode the keys and values of every position seen, which
            are those of the windows where layers have them.
        operations: two for each multiplication of a product or of attention.
    """

    tokens: int
    num_bytes: int
    operations: int


def cases(config: Config) -> Iterator[Case]:
    """Every batch size with every prompt length."""
    section = config.bench
    for batch_size in section.batch_sizes:
        for length in section.prompt_lengths:
            yield Case(batch_size, length, section.new_tokens, config.generation.prefill_chunk)


def num_steps(phase: str, case: Case) -> int:
    """Steps of a prefill or a decode."""
    if phase == "decode":
        return case.new_tokens
    return -(-case.batch_size * case.prompt_length // case.chunk)


def prefill_work(memory: Memory, case: Case, ranks: Iterable[int], tp: int) -> Work:
    """The work of `ranks`; attention is causal, and only last positions get logits."""
    ranks = tuple(ranks)
    tokens = case.batch_size * case.prompt_length
    seen = case.batch_size * positions_seen(memory.layout.config.windows, 0, case.prompt_length)
    return Work(
        tokens,
        num_steps("prefill", case) * sum(memory.read_bytes(rank, tp) for rank in ranks),
        _operations(memory.layout, ranks, tp, tokens, case.batch_size, seen),
    )


def decode_work(memory: Memory, case: Case, ranks: Iterable[int], tp: int) -> Work:
    """The work of `ranks` in all decode steps of a case."""
    layout, ranks = memory.layout, tuple(ranks)
    tokens = case.batch_size * case.new_tokens
    windows = layout.config.windows
    seen = case.batch_size * positions_seen(windows, case.prompt_length, case.length)
    weights = sum(memory.read_bytes(rank, tp) for rank in ranks)
    cached = len(ranks) * seen * kv_position_bytes(layout, tp, memory.dtype)
    return Work(
        tokens,
        case.new_tokens * weights + cached,
        _operations(layout, ranks, tp, tokens, tokens, seen),
    )


def _operations(
    layout: Layout, ranks: tuple[int, ...], tp: int, tokens: int, logits: int, seen: int
) -> int:
    """Args: tokens that pass the layers, positions with logits, positions that all queries see in all
    layers."""
    config = layout.config
    heads = config.num_attention_heads // tp * len(ranks)
    attention = 4 * heads * config.head_dim * seen
    linears = sum(
        math.prod(cut.stop - cut.start for cut in row.index(rank, tp))
        for rank in ranks
        for row in layout.table.values()
        if row.is_linear and row.name != HEAD
    )
    head = config.vocab_size * config.hidden_size * len(ranks) // tp
    return 2 * linears * tokens + 2 * head * logits + attention
