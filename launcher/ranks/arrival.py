"""How a rank arrives at the store and waits for the others: a missing one is named."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import NoReturn

import torch.distributed as dist

from launcher.environment.worker import WorkerEnvironment
from launcher.failures import RunError
from launcher.ranks.deadline import Deadline
from launcher.ranks.notice import Notice
from launcher.ranks.place import Place, is_here, is_running, place_of_process

_POLL_S = 0.02
# For how long a store that is refused stays, so that the others read why.
_REFUSAL_S = 0.2


def take_rank(
    store: dist.Store, environment: WorkerEnvironment, deadline: Deadline, notice: Notice
) -> int:
    """Claim the launcher's rank; where it gave none, the lowest that nobody of the job claims.

    Raises:
        RunError: another process has it, or there are more processes than ranks.
    """
    size = environment.size
    assert size is not None
    arrival = store.add("arrivals", 1) - 1
    if arrival >= size:
        raise RunError(f"{arrival + 1} workers arrived, but the job has {size}: one is too many")
    claimed = -1 if environment.rank is None else environment.rank
    store.set(f"claim/{arrival}", str(claimed))
    rank = claimed if claimed >= 0 else _free_rank(store, arrival, size, deadline, notice)
    if store.add(f"taken/{rank}", 1) > 1:
        _refuse(store, f"two workers claim rank {rank}; give each its own RANK_ID")
    store.set(f"place/{rank}", json.dumps(place_of_process()))
    return rank


def wait_for_places(
    store: dist.Store, size: int, deadline: Deadline, notice: Notice
) -> list[Place]:
    """Where each rank runs, once all have arrived; raises as `wait_for`."""
    return [json.loads(value) for value in wait_for(store, "place", size, deadline, notice)]


def wait_for(
    store: dist.Store,
    what: str,
    size: int,
    deadline: Deadline,
    notice: Notice,
    verb: str = "arrive",
    ranks: Sequence[int] | None = None,
) -> list[bytes]:
    """The values of `what/RANK`, in rank order.

    Args:
        size: of the job.
        notice: is told who is missing.
        ranks: default: all.

    Raises:
        RunError: names the ranks that are missing at the deadline, or one that died or was refused
            while the others wait.
    """
    missing = ranks = list(range(size) if ranks is None else ranks)
    while missing := [rank for rank in missing if not store.check([f"{what}/{rank}"])]:
        _check_nobody_failed(store, size)
        notice.whom = _whom(store, missing, size, verb)
        if deadline.is_over:
            _refuse(store, _who_is_missing(store, missing, size, deadline, verb))
        time.sleep(_POLL_S)
    notice.whom = ""
    return [store.get(f"{what}/{rank}") for rank in ranks]


def _free_rank(
    store: dist.Store, arrival: int, size: int, deadline: Deadline, notice: Notice
) -> int:
    """The n-th unclaimed rank, n being how many without one arrived before."""
    while not store.check([f"claim/{index}" for index in range(size)]):
        _check_nobody_failed(store, size)
        notice.whom = _whom(store, [], size, "arrive")
        if deadline.is_over:
            _refuse(store, _who_is_missing(store, [], size, deadline, "arrive"))
        time.sleep(_POLL_S)
    claims = [int(store.get(f"claim/{index}")) for index in range(size)]
    free = sorted(set(range(size)) - set(claims))
    return free[claims[:arrival].count(-1)]


def _who_is_missing(
    store: dist.Store, missing: list[int], size: int, deadline: Deadline, verb: str
) -> str:
    """The missing ranks; where ranks are handed out nobody knows who is missing, only how many."""
    claims = _claims(store, size)
    ranks = [str(claim) for claim in sorted(claims) if claim >= 0]
    where = f"within {deadline.timeout_s:g} s"
    if _are_named(claims, size):
        return (
            f"rank {_listed(missing)} of {size} did not {verb} {where}; look at the logs of those "
            "processes"
        )
    listed = (
        f" (rank {', '.join(ranks)}, and {claims.count(-1)} without a RANK_ID)" if ranks else ""
    )
    return f"only {len(claims)} of {size} workers arrived {where}{listed}; look at the others' logs"


def _whom(store: dist.Store, missing: list[int], size: int, verb: str) -> str:
    """The same for a notice."""
    claims = _claims(store, size)
    if _are_named(claims, size):
        return f"rank {_listed(missing)} of {size} to {verb}"
    return f"{size - len(claims)} of {size} workers to {verb}"


def _claims(store: dist.Store, size: int) -> list[int]:
    """The rank that each arrival claims; -1: any."""
    arrived = [index for index in range(size) if store.check([f"claim/{index}"])]
    return [int(store.get(f"claim/{index}")) for index in arrived]


def _are_named(claims: list[int], size: int) -> bool:
    """Whether each worker that is missing has a rank: nobody of those that came may still take it."""
    return len(claims) == size or -1 not in claims


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _refuse(store: dist.Store, problem: str) -> NoReturn:
    """The job cannot become whole: every rank ends with the same sentence."""
    store.set("refused", problem)
    # If the store lives here, the others have a moment to read it.
    time.sleep(_REFUSAL_S)
    raise RunError(problem)


def _check_nobody_failed(store: dist.Store, size: int) -> None:
    """Raises RunError if the job cannot become whole any more."""
    if store.check(["refused"]):
        raise RunError(store.get("refused").decode())
    for rank in range(size):
        if store.check([f"place/{rank}"]):
            place = json.loads(store.get(f"place/{rank}"))
            if is_here(place) and not is_running(place) and not store.check([f"ended/{rank}"]):
                raise RunError(
                    f"rank {rank} (host {place['host']}, pid {place['pid']}) ended without a word "
                    "while the others waited"
                )
