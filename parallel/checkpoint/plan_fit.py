"""What fits into a rank's memory, and which sizes cannot be, with the reason. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from parallel.checkpoint.layout import Layout
from parallel.checkpoint.plan import RankPlan, Workload, kv_cache_bytes, temporary_bytes

_MOST_SEQUENCES = 1 << 20


def longest_context(layout: Layout, plan: RankPlan, workload: Workload, memory_bytes: int) -> int:
    """Tokens of each sequence of the batch that fit, at most the model's context; 0: none do."""

    def fits(length: int) -> bool:
        return _fits(layout, plan, replace(workload, max_length=length), memory_bytes)

    return _largest(fits, layout.config.max_position_embeddings)


def largest_batch(layout: Layout, plan: RankPlan, workload: Workload, memory_bytes: int) -> int:
    """Sequences of the plan's length that fit, at most a million; 0: not one."""

    def fits(batch_size: int) -> bool:
        return _fits(layout, plan, replace(workload, batch_size=batch_size), memory_bytes)

    return _largest(fits, _MOST_SEQUENCES)


def obstacles(layout: Layout, sizes: Iterable[int]) -> dict[str, list[int]]:
    """The sizes that do not work, together where the reason is the same."""
    found: dict[str, list[int]] = {}
    for tp in sizes:
        if (reason := _obstacle(layout, tp)) is not None:
            found.setdefault(reason, []).append(tp)
    return found


def _fits(layout: Layout, plan: RankPlan, workload: Workload, memory_bytes: int) -> bool:
    kv_cache = kv_cache_bytes(layout, plan.tp, workload)
    temporary = temporary_bytes(layout, plan.tp, workload)
    return plan.weight_bytes + kv_cache + temporary <= memory_bytes


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest of 1 to `most` that fits, by halving; what needs less than it fits too."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _obstacle(layout: Layout, tp: int) -> str | None:
    """The first rule that a size breaks; `Layout.check_tp` is the same in one sentence."""
    heads, kv = layout.config.num_attention_heads, layout.config.num_key_value_heads
    if heads % tp:
        return f"must divide num_attention_heads ({heads})"
    if kv % tp and tp % kv:
        return f"must divide num_key_value_heads ({kv}), or be a multiple of them"
    if tp in layout.valid_tp_sizes():
        return None
    row, num_units = layout.least_units()
    shape = "x".join(map(str, row.shape))
    return f"would leave a rank nothing of {row.name} ({shape}), which has {num_units} parts"
