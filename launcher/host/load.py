"""How busy the host is with other work than ours: what makes a measurement untrue."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Of the first line of /proc/stat: idle and waiting for a disk are no work, and guests count twice.
_WORKING = ("user", "nice", "system", "irq", "softirq", "steal")
_FIELDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


@dataclass(frozen=True)
class LoadMark:
    """A moment, seen from one process.

    Attributes:
        at: in seconds of a clock.
        host_s: core seconds that the whole host has worked; 0 where the system does not say.
        own_s: those of this process.
    """

    at: float
    host_s: float
    own_s: float

    @classmethod
    def now(cls) -> LoadMark:
        return cls(time.perf_counter(), _host_s(), time.process_time())


def other_cores(start: LoadMark, end: LoadMark, own_s: Sequence[float]) -> float:
    """Cores that others kept busy between two marks, on average; never below 0.

    Args:
        own_s: core seconds of each rank between the marks. Ranks on other hosts make it too low.
    """
    spent = end.host_s - start.host_s - sum(own_s)
    return max(0.0, spent / max(end.at - start.at, 1e-9))


def _host_s() -> float:
    try:
        line = Path("/proc/stat").read_text().partition("\n")[0]
        ticks = dict(zip(_FIELDS, map(int, line.split()[1:]), strict=False))
    except (OSError, ValueError):
        return 0.0
    return sum(ticks.get(name, 0) for name in _WORKING) / os.sysconf("SC_CLK_TCK")
