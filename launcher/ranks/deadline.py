"""Deadline: until when the ranks wait for each other."""

from __future__ import annotations

import time

from launcher.environment.worker import WorkerEnvironment


class Deadline:
    """A point in time that every wait of one arrival shares."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._end

    @property
    def remaining_s(self) -> float:
        return max(1.0, self._end - time.monotonic())


def arrival_deadline(environment: WorkerEnvironment, timeout_s: float) -> Deadline:
    """The launcher's deadline or ours, whichever is earlier."""
    return Deadline(min(timeout_s, environment.start_timeout_s or timeout_s))
