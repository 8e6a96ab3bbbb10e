"""Numbers in shared memory by which ranks tell each other how far they are, and the waits for them.

Each number has one owner, which alone writes it, and only ever raises it. A rank writes its data
first and raises its number after; who sees the number then sees the data. That holds where stores
become visible in the order in which they were made, and loads are made in the order of the
program: on x86 (total store order), not on Arm, so `is_ordered_processor` is asked first. In
detail, for x86:

- a number is 8 bytes at an address that 8 divides, written by one store: nobody sees half of it;
- a compiler moves nothing across the calls into the interpreter and into torch that lie between;
- stores of torch's other threads come first, as they meet at a locked instruction before the
  operation returns, and x86 stores are seen in one order by all;
- non-temporal stores, which the order does not hold for, are made by memcpy of large blocks alone,
  and it ends with a fence.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# Two cache lines: processors fetch them in pairs, and a waiting rank must not slow its neighbour.
CELL_BYTES = 128
_CELL_WORDS = CELL_BYTES // 8
_LOOK_S = 0.1
# Between two looks of ours: if more has passed, it was we who were stopped, and nobody is late.
_OWN_STOP_S = 1.0
# A process that has been stopped (SIGSTOP) for so long, while this one was not, is not coming back.
_FROZEN_S = 3.0
_LONGEST_NAP_S = 1e-3


def is_ordered_processor() -> bool:
    """Whether stores of one core are seen by the others in the order in which they were made."""
    return platform.machine().lower() in ("x86_64", "amd64", "i686", "i386")


class AbsentError(RuntimeError):
    """A wait that will not end: the message says for whom and why."""


@dataclass(frozen=True)
class Patience:
    """How a rank waits: it looks without a pause, then lets others run, then sleeps.

    Attributes:
        spin_s: how long it looks without a pause; keeps its core from all others.
        yield_s: until when it looks again after each turn of the others on its core.
        nap_s: its first sleep; each is longer than the one before.
    """

    spin_s: float
    yield_s: float
    nap_s: float

    @classmethod
    def of(cls, is_crowded: bool) -> Patience:
        """Where cores are fewer than those who want one, the rank waited for may need this core.

        Giving the core away costs a microsecond where nobody wants it, so looking without a pause
        gains nothing but that; a sleep costs 50 us and more to wake from.
        """
        return cls(0.0, 500e-6, 20e-6) if is_crowded else cls(20e-6, 2e-3, 50e-6)


class Presence(Protocol):
    """What is known of the processes of ranks, by their names."""

    def is_running(self, rank: int) -> bool:
        """Whether its process is there."""
        ...

    def is_stopped(self, rank: int) -> bool:
        """Whether its process is there and was stopped by a signal."""
        ...


class Signals:
    """The numbers of all ranks, and this rank's waits for those of the others.

    Args:
        memory: room for `num_bytes(size)` bytes, zero at first.
        names: how messages call each rank.
        timeout_s: deadline of one wait.
    """

    def __init__(
        self,
        memory: memoryview,
        names: Sequence[int],
        timeout_s: float,
        presence: Presence,
        patience: Patience,
    ) -> None:
        self._words = memory.cast("Q")
        self._names = names
        self._timeout_s = timeout_s
        self._presence = presence
        self._patience = patience

    @staticmethod
    def num_bytes(size: int) -> int:
        """One number for each rank's turn, and two for each pair's mail."""
        return CELL_BYTES * size * (1 + 2 * size)

    def turn_cell(self, rank: int) -> int:
        """The turn that the rank has reached."""
        return rank

    def sent_cell(self, source: int, destination: int) -> int:
        """How many pieces of mail the source has laid down; the source's."""
        return (1 + source) * len(self._names) + destination

    def received_cell(self, source: int, destination: int) -> int:
        """How many pieces of mail the destination has taken away; the destination's."""
        return (1 + len(self._names) + destination) * len(self._names) + source

    def raise_to(self, cell: int, value: int) -> None:
        """Say that this rank is so far, once all it wrote for the others is written."""
        self._words[cell * _CELL_WORDS] = value

    def wait_for(self, cells: Sequence[int], value: int) -> None:
        """Return once all these numbers have reached the value.

        Raises:
            AbsentError: the process of a rank that is waited for is gone, or stays stopped, or the
                deadline passed.
        """
        words = self._words
        for cell in cells:
            if words[cell * _CELL_WORDS] < value and not self._spin(cell * _CELL_WORDS, value):
                self._sleep_until(cells, value)

    def _spin(self, word: int, value: int) -> bool:
        """Look for a short while; whether the number has come."""
        words, now = self._words, time.perf_counter
        start = now()
        spin_end = start + self._patience.spin_s
        while now() < spin_end:
            if words[word] >= value:
                return True
        yield_end = start + self._patience.yield_s
        while now() < yield_end:
            if words[word] >= value:
                return True
            os.sched_yield()
        return False

    def _sleep_until(self, cells: Sequence[int], value: int) -> None:
        nap_s, seen_at = self._patience.nap_s, time.monotonic()
        deadline, look_at = seen_at + self._timeout_s, seen_at
        ran_at = seen_at  # when none of those who are late was seen stopped
        while late := [cell for cell in cells if self._words[cell * _CELL_WORDS] < value]:
            now = time.monotonic()
            if now - seen_at > _OWN_STOP_S:
                deadline += now - seen_at
                ran_at = now
            seen_at = now
            if now >= look_at:
                look_at = now + _LOOK_S
                self._check_alive(late, value)
                stopped = [cell for cell in late if self._presence.is_stopped(self._name(cell))]
                ran_at = ran_at if stopped else now
                if now - ran_at > _FROZEN_S:
                    raise AbsentError(f"{self._named(stopped)} was stopped by a signal")
            if now > deadline:
                text = f"{self._named(late)} did not come within {self._timeout_s:g} s"
                raise AbsentError(text)
            time.sleep(nap_s)
            nap_s = min(nap_s * 1.5, _LONGEST_NAP_S)

    def _check_alive(self, late: Sequence[int], value: int) -> None:
        gone = [cell for cell in late if not self._presence.is_running(self._name(cell))]
        # It may have come, and then ended in good order, between our two questions.
        gone = [cell for cell in gone if self._words[cell * _CELL_WORDS] < value]
        if gone:
            raise AbsentError(f"{self._named(gone)} is gone")

    def _name(self, cell: int) -> int:
        """The name of the rank that raises this number."""
        size = len(self._names)
        return self._names[cell if cell < size else (cell // size - 1) % size]

    def _named(self, cells: Sequence[int]) -> str:
        return f"rank {', '.join(str(self._name(cell)) for cell in cells)}"
