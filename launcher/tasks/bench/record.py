"""What a bench reports of one phase of one case: a line of result.jsonl. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from launcher.tasks.bench.work import Case, Work

Record = dict[str, Any]


class Phase(Protocol):
    """What one rank saw; launcher/tasks/bench/case.py."""

    @property
    def seconds(self) -> float: ...

    @property
    def calls_s(self) -> Sequence[float]: ...

    @property
    def communication_s(self) -> float: ...


# The phase as every rank saw it, in rank order.
Run = Sequence[Phase]


@dataclass(frozen=True)
class Host:
    """What else was seen during a case.

    Attributes:
        peak_bytes: the most memory of each rank.
        other_cores: how many cores other processes kept busy.
    """

    peak_bytes: Sequence[int]
    other_cores: float


@dataclass(frozen=True)
class Measured:
    """One phase of one case.

    Attributes:
        runs: its repeats.
        work: that each repeat did.
        bandwidths: bytes/s that all ranks read at once, measured before and after.
    """

    phase: str
    case: Case
    runs: Sequence[Run]
    work: Work
    bandwidths: Sequence[float]
    host: Host


def make_record(context: Mapping[str, Any], found: Measured) -> Record:
    """The fields of result.jsonl; every figure of speed is the median of the repeats.

    `communication_share` is what collectives cost beside the waits: of each call the time of the
    rank that was there shortest, which came last and waited for nobody. `waiting_share` is how much
    longer the rank that waited most was there. `skew` is the compute time of the slowest rank over
    the fastest's.
    """
    seconds = [_seconds(run) for run in found.runs]
    typical = median(seconds)
    work = found.work
    return {
        "phase": found.phase,
        **context,
        "batch_size": found.case.batch_size,
        "prompt_length": found.case.prompt_length,
        "new_tokens": found.case.new_tokens,
        "repeats": len(seconds),
        "seconds": seconds,
        "seconds_median": typical,
        "tokens": work.tokens,
        "tokens_per_s": work.tokens / typical,
        "tokens_per_s_least": work.tokens / max(seconds),
        "tokens_per_s_most": work.tokens / min(seconds),
        "bytes": work.num_bytes,
        "bytes_per_s": work.num_bytes / typical,
        "bandwidth_bytes_per_s": max(found.bandwidths),
        "bandwidth_bytes_per_s_median": median(found.bandwidths),
        "bandwidth_share": work.num_bytes / typical / max(found.bandwidths),
        "operations": work.operations,
        "operations_per_s": work.operations / typical,
        "communication_share": _median(found, lambda run: _exchange_s(run) / _seconds(run)),
        "waiting_share": _median(found, lambda run: _waiting_s(run) / _seconds(run)),
        "compute_s": [median(times) for times in zip(*map(_compute, found.runs), strict=True)],
        "skew": _median(found, lambda run: max(_compute(run)) / max(min(_compute(run)), 1e-9)),
        "peak_bytes": list(found.host.peak_bytes),
        "other_cores": found.host.other_cores,
    }


def read_records(path: Path) -> list[Record]:
    """The records of a result.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _median(found: Measured, figure: Callable[[Run], float]) -> float:
    return median(map(figure, found.runs))


def _seconds(run: Run) -> float:
    """A run takes as long as its slowest rank."""
    return max(phase.seconds for phase in run)


def _exchange_s(run: Run) -> float:
    return sum(min(calls) for calls in zip(*(phase.calls_s for phase in run), strict=True))


def _waiting_s(run: Run) -> float:
    return max(phase.communication_s for phase in run) - _exchange_s(run)


def _compute(run: Run) -> list[float]:
    return [phase.seconds - phase.communication_s for phase in run]
