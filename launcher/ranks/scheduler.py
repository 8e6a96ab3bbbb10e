"""MindSpore's scheduler process: it hosts the store and says how the workers ended."""

from __future__ import annotations

import sys
from typing import Any

from launcher.environment.worker import WorkerEnvironment
from launcher.ranks.arrival import wait_for_places
from launcher.ranks.deadline import arrival_deadline
from launcher.ranks.notice import Notice
from launcher.ranks.presence import Presence
from launcher.ranks.store import open_store


def host_until_done(environment: WorkerEnvironment, timeout_s: float) -> int:
    """Host the store until every worker has ended.

    Returns:
        0 if all ended well, else 1.
    """
    assert environment.size is not None
    deadline = arrival_deadline(environment, timeout_s)
    with Notice(sys.stderr, "the scheduler", deadline).given() as notice:
        store = open_store(environment, deadline, notice)
        presence = Presence(store, wait_for_places(store, environment.size, deadline, notice))
    ends = presence.wait_for_ends()
    if problem := _problem_of(presence, ends):
        print(f"shardrun: {problem} (said the scheduler)", file=sys.stderr, flush=True)
    return int(bool(problem))


def _problem_of(presence: Presence, ends: list[dict[str, Any] | None]) -> str:
    """What the first rank of those that failed by themselves said; else who said nothing."""
    failed = {rank: end for rank, end in enumerate(ends) if end and end["status"]}
    for rank, end in failed.items():
        if end["is_cause"]:
            return f"rank {rank} failed: {end['message']}"
    wordless = [rank for rank, end in enumerate(ends) if end is None]
    if wordless:
        return f"{presence.describe(*wordless)} ended without a word"
    return f"rank {min(failed)} failed" if failed else ""
