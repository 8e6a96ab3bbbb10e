"""Watching the other ranks: whoever dies or hangs is named, and nobody waits for it for ever.

A thread in each worker beats into the store twice a second, and looks whether the others live. It
works under every launcher, also where no parent watches: hand-set `MS_*`, srun, mpirun.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from launcher.failures import RunError
from launcher.ranks.behind import Behind
from launcher.ranks.member import Member
from launcher.ranks.place import Place, end_stuck, is_here
from launcher.ranks.presence import SILENCE_S, Presence, write_beat

BEAT_S = 0.5
# A rank whose watch has missed several beats is stopped, not slow.
_STUCK_S = 4 * BEAT_S
_NOT_RUNNING = "it no longer runs"


class StuckRankError(RunError):
    """A rank did not answer within the deadline of a collective.

    Attributes:
        rank: which one; the error is recorded as its own.
        place: where it runs.
        reason: who waited for it, and what it did.
    """

    def __init__(self, rank: int, place: Place, who: str, reason: str) -> None:
        super().__init__(f"{who} did not answer: {reason}")
        self.rank = rank
        self.place = place
        self.reason = reason


class Watch:
    """Beats for this rank and looks after the others.

    Args:
        member: this rank.
        on_lost: called from the watching thread with a sentence when a rank is gone; it must end
            the process.
    """

    def __init__(self, member: Member, on_lost: Callable[[str], None]) -> None:
        self._member = member
        self._on_lost = on_lost
        # Its own connection: a call that blocks on the worker's would block the beat.
        self._store = member.store.clone()
        self._store.set_timeout(timedelta(seconds=10))
        self._presence = Presence(self._store, member.places)
        self._others = [rank for rank in range(member.size) if rank != member.rank]
        self._progress: Callable[[], int] = int
        self._behind: Behind | None = None
        self._doing = ""
        self._answered_at = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def follow(self, progress: Callable[[], int], timeout_s: float) -> None:
        """From now on each beat says how far this rank is, and ranks that are behind are named.

        Args:
            progress: how many collectives this rank has entered.
            timeout_s: deadline of one.
        """
        self._progress = progress
        self._behind = Behind(self._member, self._presence, timeout_s)

    def say_doing(self, words: str) -> None:
        """What this rank is at, for those that wait for it; "": nothing of note."""
        self._doing = words

    def stop(self) -> None:
        """Stop watching, before this rank says how it ended."""
        self._stopped.set()
        self._thread.join(_STUCK_S)

    def describe_failure(self, call: str) -> str:
        """Why a collective broke: a rank that is gone.

        Raises:
            StuckRankError: all live, and one is behind the others.
            RunError: all live, and none is behind.
        """
        if not self._store_answers():
            return f"{call} broke: {self._find_stuck_host(call)}"
        try:
            return f"{call} broke: {self._wait_for_lost() or self._find_stuck(call)}"
        except dist.DistError:
            return f"{call} broke: {self._store_sentence()}"

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_S):
            sentence = self._look()
            # A rank that is about to fail by itself has a moment to tell a better story.
            if sentence and not self._stopped.wait(3 * BEAT_S):
                self._on_lost(sentence)
                return

    def _look(self) -> str:
        """Beat, and say which rank is lost."""
        try:
            progress = self._progress()
            write_beat(self._store, self._member.rank, progress, self._doing)
            sentence = self._lost_sentence()
            if self._behind is not None and not sentence:
                self._behind.look(progress)
        except dist.DistError:
            return self._store_sentence()
        self._answered_at = time.monotonic()
        return sentence

    def _store_answers(self) -> bool:
        """Whether what the watching thread asks of the store comes back; it would wait for ever."""
        while self._thread.is_alive() and not self._stopped.is_set():
            silence_s = time.monotonic() - self._answered_at
            if silence_s < 2 * BEAT_S:
                return True
            if silence_s > BEAT_S + _STUCK_S:
                return False
            time.sleep(0.05)
        return True

    def _find_stuck_host(self, call: str) -> str:
        if self._member.store_host != "rank 0":
            return f"{self._member.store_host}, which hosts the rendezvous, does not answer"
        raise self._stuck_error(call, [0], _NOT_RUNNING)

    def _wait_for_lost(self) -> str:
        """Whoever broke a collective is soon known as gone; on another machine it takes longer."""
        all_here = all(is_here(place) for place in self._member.places)
        deadline = time.monotonic() + (2 * BEAT_S if all_here else SILENCE_S + 2 * BEAT_S)
        while time.monotonic() < deadline:
            if sentence := self._lost_sentence():
                return sentence
            time.sleep(0.05)
        return ""

    def _lost_sentence(self) -> str:
        """Leads with the rank where it began, then with what one heard of it; "" if all is well."""
        ends = {rank: self._presence.end(rank) for rank in self._others}
        failed = {rank: end for rank, end in ends.items() if end and end["status"]}
        for rank, end in failed.items():
            if end["is_cause"]:
                return f"rank {rank} failed: {end['message']}"
        wordless = [rank for rank in self._others if not ends[rank] and not self._lives(rank)]
        if wordless and not failed:
            return f"{self._presence.describe(*wordless)} ended without a word"
        return next((_heard(rank, end) for rank, end in failed.items()), "")

    def _lives(self, rank: int) -> bool:
        # Between our two questions it may have ended in good order.
        return self._presence.is_alive(rank) or self._presence.end(rank) is not None

    def _find_stuck(self, call: str) -> str:
        silent = self._silent_ranks()
        counts = {rank: self._presence.progress(rank) for rank in self._others}
        counts[self._member.rank] = self._progress()
        fewest = min(counts.values())
        behind = [rank for rank, count in counts.items() if count == fewest]
        if silent:
            stuck, reason = silent, _NOT_RUNNING
        elif len(behind) < len(counts):
            stuck, reason = behind, f"it entered only {fewest} collectives"
        else:
            # Nobody else is to blame: it is this call itself that cannot be done.
            raise RunError(f"{call} broke, while all ranks live and none is behind the others")
        raise self._stuck_error(call, sorted(stuck), reason)

    def _silent_ranks(self) -> list[int]:
        """Ranks whose watch does not beat either: stopped by a signal, or in a call that hangs."""
        deadline = time.monotonic() + _STUCK_S
        while time.monotonic() < deadline:
            for rank in self._others:
                self._presence.silence_s(rank)
            time.sleep(0.1)
        return [rank for rank in self._others if self._presence.silence_s(rank) > 0.7 * _STUCK_S]

    def _stuck_error(self, call: str, stuck: list[int], reason: str) -> StuckRankError:
        for rank in stuck if reason == _NOT_RUNNING else ():
            end_stuck(self._member.places[rank])
        who = self._presence.describe(*stuck)
        reason = f"{call} of rank {self._member.rank} waited for it; {reason}"
        return StuckRankError(stuck[0], self._member.places[stuck[0]], who, reason)

    def _store_sentence(self) -> str:
        host = self._member.store_host
        if host == "rank 0":
            host = self._presence.describe(0)
        return f"{host}, which hosts the rendezvous, ended without a word"


def _heard(rank: int, end: dict[str, Any]) -> str:
    """What a rank said that failed because of another; its own sentence names that one."""
    return f"{end['message']} (said rank {rank})"
