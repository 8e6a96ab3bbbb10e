"""Watching the other ranks: whoever dies or hangs is named, and nobody waits for it for ever.

A thread in each worker beats into the store twice a second, and looks whether the others still live.
It works under every launcher, also where no parent watches: hand-set `MS_*`, srun, mpirun.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from launcher.failures import EXIT_FAILED
from launcher.rendezvous import Member, is_alive, read_end

BEAT_S = 0.5
# A rank on another host that has been silent for so long is taken for dead.
SILENCE_S = 6.0


class Watch:
    """Beats for this rank and looks after the others.

    Args:
        member: this rank.
        progress: says how far this rank is, such as its number of collectives.
        on_lost: called from the watching thread with a sentence when a rank is gone; it must end
            the process.
    """

    def __init__(
        self, member: Member, progress: Callable[[], int], on_lost: Callable[[str], None]
    ) -> None:
        self._member = member
        self._progress = progress
        self._on_lost = on_lost
        # Its own connection: a call that blocks on the worker's would block the beat.
        self._store = member.store.clone()
        self._store.set_timeout(timedelta(seconds=10))
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop watching, before this rank says how it ended."""
        self._stopped.set()
        self._thread.join()

    def describe_failure(self, call: str) -> str:
        """Why a collective broke: looks for a dead rank for a moment, then for the slowest."""
        deadline = time.monotonic() + 2 * BEAT_S
        while time.monotonic() < deadline:
            lost = self.lost_ranks()
            if lost:
                return f"{call} broke because {self._sentence(lost)}"
            time.sleep(0.05)
        return f"{call} broke; {self._behind()}"

    def lost_ranks(self) -> list[int]:
        """Ranks that failed by themselves, are gone without a word, or are silent for SILENCE_S."""
        others = [rank for rank in range(self._member.size) if rank != self._member.rank]
        return [rank for rank in others if self._is_lost(rank)]

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_S):
            try:
                self._store.set(f"beat/{self._member.rank}", f"{time.time()} {self._progress()}")
                lost = self.lost_ranks()
            except (RuntimeError, dist.DistError):
                self._end("the rendezvous store is gone: its host process ended")
                return
            if lost:
                self._end(self._sentence(lost))
                return

    def _end(self, sentence: str) -> None:
        # A rank that is about to fail by itself has a moment to tell a better story.
        if not self._stopped.wait(3 * BEAT_S):
            self._on_lost(sentence)

    def _is_lost(self, rank: int) -> bool:
        end = read_end(self._store, rank)
        if end is not None:
            return bool(end["cause"])
        place = self._member.places[rank]
        if place["host"] == socket.gethostname():
            return not is_alive(place)
        return self._silence_s(rank) > SILENCE_S

    def _silence_s(self, rank: int) -> float:
        """Seconds on our own clock since the rank's beat last changed."""
        key = f"beat/{rank}"
        beat = self._store.get(key) if self._store.check([key]) else b""
        seen, since = self._beats.get(rank, (None, 0.0))
        if beat != seen:
            self._beats[rank] = (beat, time.monotonic())
            return 0.0
        return time.monotonic() - since

    def _behind(self) -> str:
        """The ranks that have entered the fewest collectives: the others wait for them."""
        counts = {rank: self._count(rank) for rank in range(self._member.size)}
        fewest = min(counts.values())
        behind = [rank for rank, count in counts.items() if count == fewest]
        if len(behind) == len(counts):
            return "no rank is behind the others"
        numbers = ", ".join(map(str, behind))
        return f"it waits for rank {numbers}, which entered only {fewest} collectives"

    def _count(self, rank: int) -> int:
        if rank == self._member.rank:
            return self._progress()
        key = f"beat/{rank}"
        return int(self._store.get(key).split()[1]) if self._store.check([key]) else 0

    def _sentence(self, lost: list[int]) -> str:
        """Leads with a rank that said why; the others ended without a word."""
        for rank in lost:
            end = read_end(self._store, rank)
            if end is not None:
                return f"rank {rank} failed: {end['cause']}"
        place = self._member.places[lost[0]]
        numbers = ", ".join(map(str, lost))
        return f"rank {numbers} (host {place['host']}, pid {place['pid']}) ended without a word"


def end_process(sentence: str) -> None:
    """Leave at once, also from inside a collective that would never return."""
    print(f"shardrun: {sentence}", file=sys.stderr, flush=True)
    os._exit(EXIT_FAILED)
