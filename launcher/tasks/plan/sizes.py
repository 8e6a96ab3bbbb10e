"""What a plan says of one tensor-parallel size: bytes, what fits, and times from below."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.tasks.plan.machine import Machine
from parallel.checkpoint.layout import Layout
from parallel.checkpoint.memory import Memory
from parallel.checkpoint.plan import RankPlan, Workload, plan_rank, prefill_flops
from parallel.checkpoint.plan_disk import SourceSize, prepared_bytes
from parallel.checkpoint.plan_fit import largest_batch, longest_context


@dataclass(frozen=True)
class SizePlan:
    """One size. Speeds are at most; seconds are of bytes alone. No arithmetic is in them, and no
    communication.

    Attributes:
        rank: the fullest rank.
        rank_weight_bytes: of each rank, in memory.
        disk_bytes: weights of all ranks; output_bytes: with all that `prepare` writes beside them.
        memory_bytes: that one rank has.
        longest_context: tokens of each sequence that fit; largest_batch: sequences of the plan's length.
        decode_tokens_per_s, prefill_tokens_per_s: of the whole batch; None where no speed is known.
        prepare_s: reading the source and writing the output, at the same time.
        load_disk_s, load_memory_s: all ranks on one host, from its disk or its page cache; the latter
            only where the ranks compute in the host's memory, which was measured.
    """

    rank: RankPlan
    rank_weight_bytes: tuple[int, ...]
    disk_bytes: int
    output_bytes: int
    memory_bytes: int
    longest_context: int
    largest_batch: int
    decode_tokens_per_s: float
    prefill_tokens_per_s: float | None
    prepare_s: float | None
    load_disk_s: float | None
    load_memory_s: float | None

    @property
    def fits(self) -> bool:
        return self.rank.total_bytes <= self.memory_bytes

    def to_dict(self) -> dict[str, Any]:
        rank = asdict(self.rank)
        more = {"weight_bytes": self.rank.weight_bytes, "total_bytes": self.rank.total_bytes}
        values = {key: value for key, value in asdict(self).items() if key != "rank"}
        return {**rank, **more, **values, "fits": self.fits}


def plan_size(
    layout: Layout,
    tp: int,
    workload: Workload,
    machine: Machine,
    source: SourceSize,
    path: Path | None,
) -> SizePlan:
    """Raises ModelError where the model cannot be dealt out to `tp` ranks."""
    rank = plan_rank(layout, tp, workload)
    memory, bandwidth = machine.memory(tp), machine.bandwidth(tp)
    disk = sum(layout.rank_bytes(one, tp) for one in range(tp))
    output = prepared_bytes(layout, tp, source=path)
    per_token = prefill_flops(layout, tp, workload.max_length)
    held = Memory(layout, workload.dtype, workload.packing)
    return SizePlan(
        rank=rank,
        rank_weight_bytes=tuple(held.weight_bytes(one, tp) for one in range(tp)),
        disk_bytes=disk,
        output_bytes=output,
        memory_bytes=memory,
        longest_context=longest_context(layout, rank, workload, memory),
        largest_batch=largest_batch(layout, rank, workload, memory),
        decode_tokens_per_s=rank.tokens_per_s(bandwidth / 1e9, workload.batch_size),
        prefill_tokens_per_s=machine.rank_flops / per_token if machine.rank_flops else None,
        prepare_s=_prepare_s(source.num_bytes, output, machine),
        load_disk_s=disk / machine.read_gb_s / 1e9 if machine.read_gb_s else None,
        load_memory_s=_load_memory_s(rank, machine),
    )


def _prepare_s(source_bytes: int, output_bytes: int, machine: Machine) -> float | None:
    """The longer of the two: they overlap. Where writing was not measured, as fast as reading."""
    if machine.read_gb_s is None:
        return None
    write_gb_s = machine.write_gb_s or machine.read_gb_s
    return max(source_bytes / machine.read_gb_s, output_bytes / write_gb_s) / 1e9


def _load_memory_s(rank: RankPlan, machine: Machine) -> float | None:
    if machine.host_bandwidth_gb_s is None:
        return None
    return rank.weight_bytes / machine.bandwidth(rank.tp)
