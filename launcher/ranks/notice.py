"""Notice: no wait for other ranks is silent, on a terminal or not.

One line after FIRST_S seconds, and one every EVERY_S after that, says whom a process waits for and until
when. Where many wait for the same, one of them speaks:

    until the rendezvous answers   workers of MindSpore each for itself, as each may have a terminal of
                                   its own; of other launchers' ranks rank 1
    for all to arrive, to agree    the first that waits; MindSpore's scheduler besides
    in a run (watch.py)            the lowest of the ranks that are ahead of others
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import torch.distributed as dist

from launcher.ranks.deadline import Deadline

FIRST_S = 5.0
EVERY_S = 30.0
_LOOK_S = 0.1


class Notice:
    """What a process waits for, and when that is to be said.

    Args:
        who: this process, in words.
        deadline: None: it waits for as long as those others live.

    Attributes:
        whom: who is missing, in words; "" while nobody is.
        speaks: whether this process is the one that says it.
    """

    def __init__(self, console: TextIO, who: str, deadline: Deadline | None) -> None:
        self._console = console
        self._who = who
        self._deadline = deadline
        self._due_at = time.monotonic() + FIRST_S
        self._is_elected: bool | None = None
        self.whom = ""
        self.speaks = True

    def elect(self, store: dist.Store, wait: str) -> None:
        """From now on the first of those that elect for a wait speaks; once decided, it stays."""
        if self._is_elected is None:
            self._is_elected = self.speaks = store.add(f"speaks/{wait}", 1) == 1

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self._due_at

    def look(self) -> None:
        """Say it if it is time and somebody is missing."""
        if not (self.is_due and self.whom and self.speaks):
            return
        self._due_at = time.monotonic() + EVERY_S
        end = f"until {self._deadline.end}" if self._deadline else "for as long as it lives"
        line = f"shardrun: {self._who} waits for {self.whom}, {end}"
        print(line, file=self._console, flush=True)

    @contextmanager
    def given(self) -> Iterator[Notice]:
        """Give it while the block lasts, from a thread: also a call that blocks is no silent wait."""
        is_over = threading.Event()
        thread = threading.Thread(target=self._repeat, args=(is_over,), name="notice", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            is_over.set()
            thread.join()

    def _repeat(self, is_over: threading.Event) -> None:
        while not is_over.wait(_LOOK_S):
            self.look()
