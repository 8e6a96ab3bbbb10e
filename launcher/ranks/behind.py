"""Which ranks are behind, said by one that waits for them in a collective (launcher/ranks/notice.py)."""

from __future__ import annotations

from launcher.ranks.deadline import Deadline
from launcher.ranks.member import Member
from launcher.ranks.notice import Notice
from launcher.ranks.presence import Presence


class Behind:
    """Knows from the beats how many collectives each rank has entered.

    Args:
        timeout_s: deadline of one collective.
    """

    def __init__(self, member: Member, presence: Presence, timeout_s: float) -> None:
        self._member = member
        self._presence = presence
        self._timeout_s = timeout_s
        self._count = -1

    def look(self, count: int) -> None:
        """Called at each beat with the number of collectives that this rank has entered."""
        if count != self._count:
            deadline = Deadline(self._timeout_s, "parallel.timeout_s")
            self._notice = Notice(self._member.console, f"rank {self._member.rank}", deadline)
            self._count = count
        elif self._notice.is_due:
            self._notice.whom = self._whom()
            self._notice.look()

    def _whom(self) -> str:
        """Those with the fewest collectives; "" if none is behind us, or a lower rank says it."""
        counts = {rank: self._count_of(rank) for rank in range(self._member.size)}
        at_work = {rank: count for rank, count in counts.items() if count is not None}
        behind = [rank for rank, count in at_work.items() if count == min(at_work.values())]
        ahead = [rank for rank in at_work if rank not in behind]
        if min(ahead, default=None) != self._member.rank:
            return ""
        doing = dict.fromkeys(filter(None, map(self._presence.doing, behind)))
        words = f" ({', '.join(doing)})" if doing else ""
        return f"rank {', '.join(map(str, behind))} of {self._member.size}{words}"

    def _count_of(self, rank: int) -> int | None:
        """None of a rank that has ended: nobody waits for it in a collective."""
        if rank == self._member.rank:
            return self._count
        return None if self._presence.end(rank) else self._presence.progress(rank)
