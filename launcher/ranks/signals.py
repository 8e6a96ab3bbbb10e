"""Signals: which of them end a run, and who hears them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

# What ends a run; of these Python itself raises for SIGINT only.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# What the launcher alone sends, to the agent and once.
STOP = signal.SIGUSR1
# Ranks that were told to end have as long before they are killed.
STOP_S = 5
# From linux/prctl.h.
_PR_SET_PDEATHSIG = 1


class EndingSignal(BaseException):
    """Raised where a signal that ends the run arrives."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def held_back(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Let signals come after this: a forkserver that is sent half a process prints a traceback."""
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


@contextmanager
def raising(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Raise for the first signal, save those that were ignored before: nohup's SIGHUP."""
    before = {number: signal.getsignal(number) for number in numbers}
    heard = [number for number in numbers if before[number] is not signal.SIG_IGN]

    def end(first: int, _frame: object) -> NoReturn:
        ignore(heard)
        raise EndingSignal(first)

    for number in heard:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


def leave_to_the_launcher() -> None:
    """Ignore what ends a run, in this process only: a signal to the whole group would come twice.

    The ranks that it forks die of them, and of STOP.
    """
    # All but those that were ignored before: nohup's SIGHUP.
    heard = {number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    ignore(SIGNALS)
    os.register_at_fork(after_in_child=partial(_die_of, {*heard, STOP}))


def ignore(numbers: Collection[signal.Signals]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone; torch's SIGINT waits for a SIGCONT.

    Where there is no such call, a rank sees for itself that the store is gone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _die_of(signals: Collection[signal.Signals]) -> None:
    """In a rank: at once, also inside a collective, which a handler of Python's would wait for."""
    for number in signals:
        signal.signal(number, signal.SIG_DFL)
