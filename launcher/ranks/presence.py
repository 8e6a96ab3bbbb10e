"""Whether the other ranks still live, and how those that ended did.

A rank of this machine is judged by its process, one of another by its beats:
`launcher/ranks/watch.py` writes them into the store twice a second.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch.distributed as dist

from launcher.ranks.notice import Notice
from launcher.ranks.place import Place, is_here, is_running

# A rank on another machine that has been silent for so long is taken for dead.
SILENCE_S = 6.0
# How long the host of the store stays for the others after the run has failed.
GRACE_S = 5.0
# Between two looks of ours: if more has passed, it was we who slept (Ctrl-Z, a suspended job).
_NAP_S = 3.0
_POLL_S = 0.02


class Presence:
    """What one process knows of the ranks of its job.

    Args:
        store: a connection that nobody else blocks.
    """

    def __init__(self, store: dist.Store, places: list[Place]) -> None:
        self.places = places
        self._store = store
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._looked_at = time.monotonic()

    def is_alive(self, rank: int) -> bool:
        """Whether its process lives; on another machine, whether it has been heard of lately."""
        place = self.places[rank]
        if is_here(place):
            return is_running(place)
        return self.silence_s(rank) <= SILENCE_S

    def silence_s(self, rank: int) -> float:
        """Seconds on our own clock since the rank's beat last changed, as often as we looked."""
        now = time.monotonic()
        if now - self._looked_at > _NAP_S:
            self._beats.clear()
        self._looked_at = now
        beat = self._beat(rank)
        seen, since = self._beats.setdefault(rank, (beat, now))
        if beat != seen:
            self._beats[rank] = (beat, now)
        return 0.0 if beat != seen else now - since

    def progress(self, rank: int) -> int:
        """How many collectives the rank had entered at its last beat."""
        beat = self._beat(rank)
        return int(beat.split()[1]) if beat else 0

    def doing(self, rank: int) -> str:
        """What the rank was at when it last beat; "" where it does not say."""
        return b" ".join(self._beat(rank).split()[2:]).decode()

    def end(self, rank: int) -> dict[str, Any] | None:
        """What `write_end` left for a rank; None if it has not ended, or went without a word."""
        key = f"ended/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def describe(self, *ranks: int) -> str:
        """`rank 1, 3 (host n1, pid 77)`: the place is the first one's."""
        place = self.places[ranks[0]]
        return f"rank {', '.join(map(str, ranks))} (host {place['host']}, pid {place['pid']})"

    def wait_for_ends(self, notice: Notice | None = None) -> list[dict[str, Any] | None]:
        """How each rank ended, once all have; None for one that went without a word.

        Args:
            notice: of a process that is done itself.

        After a failure the others have GRACE_S to leave; who hangs is not waited for.
        """
        failed_at = float("inf")
        while True:
            ends = [self.end(rank) for rank in range(len(self.places))]
            open_ranks = [rank for rank, end in enumerate(ends) if end is None]
            lost = [rank for rank in open_ranks if not self.is_alive(rank)]
            if len(lost) == len(open_ranks):
                return ends
            if lost or any(end["status"] for end in ends if end):
                failed_at = min(failed_at, time.monotonic())
            if time.monotonic() - failed_at > GRACE_S:
                return ends
            if notice is not None:
                notice.whom = f"{self.describe(*open_ranks)} to end"
                notice.look()
            time.sleep(_POLL_S)

    def _beat(self, rank: int) -> bytes:
        key = f"beat/{rank}"
        return self._store.get(key) if self._store.check([key]) else b""


def write_beat(store: dist.Store, rank: int, progress: int, doing: str = "") -> None:
    store.set(f"beat/{rank}", f"{time.time()} {progress} {doing}")


def write_end(store: dist.Store, rank: int, status: int, message: str, is_cause: bool) -> None:
    """Tell the others how this rank ended.

    Args:
        is_cause: the failure began here; else it is another rank's consequence.
    """
    end = {"status": status, "message": message, "is_cause": is_cause}
    store.set(f"ended/{rank}", json.dumps(end))
