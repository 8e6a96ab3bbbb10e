"""Deadline: until when the ranks wait for each other."""

from __future__ import annotations

import time

from launcher.environment.worker import WorkerEnvironment


class Deadline:
    """A point in time that every wait of one arrival shares.

    Args:
        rule: who sets it: a key, or a variable.
    """

    def __init__(self, timeout_s: float, rule: str) -> None:
        self.timeout_s = timeout_s
        self._rule = rule
        self._end = time.monotonic() + timeout_s
        self._wall_end = time.time() + timeout_s

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._end

    @property
    def remaining_s(self) -> float:
        return max(1.0, self._end - time.monotonic())

    @property
    def end(self) -> str:
        """`10:42:05 (parallel.timeout_s=300)`; with its date where that is not today's."""
        end = time.localtime(self._wall_end)
        is_today = end[:3] == time.localtime()[:3]
        clock = time.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M:%S", end)
        return f"{clock} ({self._rule}={self.timeout_s:g})"


def arrival_deadline(environment: WorkerEnvironment, timeout_s: float) -> Deadline:
    """The launcher's deadline or ours, whichever is earlier."""
    theirs_s = environment.start_timeout_s
    if theirs_s is not None and theirs_s < timeout_s:
        return Deadline(theirs_s, "MS_TOPO_TIMEOUT")
    return Deadline(timeout_s, "parallel.start_timeout_s")
