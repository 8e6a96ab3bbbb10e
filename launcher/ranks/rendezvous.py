"""How the ranks of a job meet: a store, a rank for each, and a deadline that names who is missing.

The store is a TCPStore. Its host is torch elastic's agent (torchrun's, or that of our own start),
MindSpore's scheduler process, or rank 0 (Slurm, MPI). There is no constant port: rank 0 takes a free
one and leaves it in a file that only this job's ranks look for.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from launcher.environment.worker import WorkerEnvironment
from launcher.failures import RunError
from launcher.ranks.presence import (
    GRACE_S,
    Place,
    Presence,
    is_here,
    is_running,
    place_of_process,
    write_end,
)

_POLL_S = 0.02


@dataclass(frozen=True)
class Member:
    """A rank that has arrived, where it runs, and the store they all share.

    Attributes:
        store_host: who hosts the store, in words.
    """

    store: dist.Store
    rank: int
    size: int
    local_rank: int
    places: list[Place]
    hosts_store: bool
    store_host: str

    @property
    def is_one_host(self) -> bool:
        return all(is_here(place) for place in self.places)

    @property
    def ranks_here(self) -> list[int]:
        """The ranks on this machine, this one included."""
        return [rank for rank, place in enumerate(self.places) if is_here(place)]


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


def join(environment: WorkerEnvironment, timeout_s: float) -> Member:
    """Arrive, get a rank where the launcher gave none, and wait for the others.

    Raises:
        RunError: ranks are missing at the deadline, two processes claim one rank, or the store or
            its host is gone.
    """
    assert environment.size is not None
    deadline = arrival_deadline(environment, timeout_s)
    with _announcement(environment) as path, _named_store_errors(environment):
        store = open_store(environment, deadline, path)
        rank = _take_rank(store, environment, deadline)
        places = _wait_for_places(store, environment.size, deadline)
    here = [other for other, place in enumerate(places) if is_here(place)]
    return Member(
        store=store,
        rank=rank,
        size=environment.size,
        local_rank=here.index(rank) if environment.local_rank is None else environment.local_rank,
        places=places,
        hosts_store=hosts_store(environment),
        store_host=_store_host(environment),
    )


def host_until_done(environment: WorkerEnvironment, timeout_s: float) -> int:
    """MindSpore's scheduler process: host the store until every worker has ended.

    Returns:
        0 if all ended well, else 1.
    """
    assert environment.size is not None
    deadline = arrival_deadline(environment, timeout_s)
    store = open_store(environment, deadline, None)
    presence = Presence(store, _wait_for_places(store, environment.size, deadline))
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


def say_ended(member: Member, status: int, message: str, *, is_cause: bool) -> None:
    """Tell the others how this rank ended.

    The rank that hosts the store stays until the others have ended too.
    """
    thread = threading.Thread(target=_tell, args=(member, status, message, is_cause), daemon=True)
    thread.start()
    # A host that is stopped never answers: nobody waits for it for ever.
    thread.join(None if member.hosts_store else GRACE_S)


def _tell(member: Member, status: int, message: str, is_cause: bool) -> None:
    try:
        write_end(member.store, member.rank, status, message, is_cause)
        if member.hosts_store:
            Presence(member.store, member.places).wait_for_ends()
    except dist.DistError:
        return  # the host of the store is gone: nobody is left to be told


def wait_for(
    store: dist.Store, what: str, size: int, deadline: Deadline, verb: str = "arrive"
) -> list[bytes]:
    """The values of `what/0` to `what/size-1`.

    Raises:
        RunError: names the ranks that are missing at the deadline, or one that died or was refused
            while the others wait.
    """
    missing = list(range(size))
    while missing := [rank for rank in missing if not store.check([f"{what}/{rank}"])]:
        _check_nobody_failed(store, size)
        if deadline.is_over:
            _refuse(store, _who_is_missing(store, missing, size, deadline, verb))
        time.sleep(_POLL_S)
    return [store.get(f"{what}/{rank}") for rank in range(size)]


def hosts_store(environment: WorkerEnvironment) -> bool:
    """Whether the store lives in this process, and so must outlive the other ranks' use of it."""
    if environment.launcher == "torchrun":
        # Its agent hosts one already, unless an old torchrun leaves that to rank 0.
        return environment.rank == 0 and not _uses_agent_store()
    if environment.launcher == "mindspore":
        return environment.is_scheduler
    return environment.rank == 0


def open_store(
    environment: WorkerEnvironment, deadline: Deadline, announcement: Path | None
) -> dist.Store:
    """Connect to the job's store, or host it where that is this process's part.

    Args:
        announcement: the file in which rank 0 leaves its port, if there is no other way.

    Raises:
        RunError: nobody hosts the store before the deadline, or its port is taken.
    """
    if announcement is not None:
        store = _announced_store(announcement, environment.rank == 0, deadline)
    else:
        assert environment.store is not None
        host, _, port = environment.store.rpartition(":")
        store = _tcp_store(host, int(port), hosts_store(environment), deadline)
    # A job's own prefix: whoever reaches a neighbour's store by mistake meets nobody there.
    return dist.PrefixStore(f"shardrun/{environment.job}", store)


def _uses_agent_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store_host(environment: WorkerEnvironment) -> str:
    if environment.launcher == "mindspore":
        return "the scheduler"
    return "torch elastic's agent" if _uses_agent_store() else "rank 0"


@contextmanager
def _named_store_errors(environment: WorkerEnvironment) -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise RunError(
            f"the rendezvous is gone: {_store_host(environment)}, which hosts it, ended "
            f"({_first_line(error)})"
        ) from error


def _tcp_store(host: str, port: int, is_host: bool, deadline: Deadline) -> dist.Store:
    if not is_host:
        _wait_for_listener(host, port, deadline)
    # The host itself needs no name that others know it by, and listens on all its addresses.
    # wait_for_workers=False: torch's own wait would not say who is missing.
    try:
        return dist.TCPStore(
            "127.0.0.1" if is_host else host,
            port,
            is_master=is_host,
            timeout=timedelta(seconds=deadline.remaining_s),
            wait_for_workers=False,
        )
    except (RuntimeError, dist.DistError) as error:
        action = "open" if is_host else "reach"
        raise RunError(
            f"could not {action} the rendezvous at {host}:{port} ({_first_line(error)})"
        ) from error


def _wait_for_listener(host: str, port: int, deadline: Deadline) -> None:
    """Knock until somebody listens: torch's own wait cannot be interrupted, and logs every try."""
    while True:
        try:
            socket.create_connection((host, port), timeout=deadline.remaining_s).close()
            return
        except OSError as error:
            if deadline.is_over:
                raise RunError(
                    f"could not reach the rendezvous at {host}:{port} within "
                    f"{deadline.timeout_s:g} s ({error}); is its host process running, and is "
                    "the address right (MASTER_ADDR, MS_SCHED_HOST)?"
                ) from error
        time.sleep(5 * _POLL_S)


@contextmanager
def _announcement(environment: WorkerEnvironment) -> Iterator[Path | None]:
    """The file of the port, where the launcher names no store; gone once all have arrived."""
    if environment.store is not None:
        yield None
        return
    try:
        yield environment.announcement
    finally:
        if environment.rank == 0:
            environment.announcement.unlink(missing_ok=True)


def _announced_store(path: Path, is_host: bool, deadline: Deadline) -> dist.Store:
    """All ranks are on this host: rank 0 takes a free port and writes it where the others look."""
    if not is_host:
        return _tcp_store("127.0.0.1", _announced_port(path, deadline), False, deadline)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"port": store.port, **place_of_process()}))
    partial.rename(path)
    return store


def _announced_port(path: Path, deadline: Deadline) -> int:
    """Wait for rank 0's file; one that a dead process or another user left is not believed."""
    while not deadline.is_over:
        try:
            is_ours = path.stat().st_uid == os.getuid()
            announced = json.loads(path.read_text())
        except (OSError, ValueError):
            is_ours, announced = False, {}
        if is_ours and is_here(announced) and is_running(announced):
            return int(announced["port"])
        time.sleep(_POLL_S)
    raise RunError(
        f"rank 0 did not arrive within {deadline.timeout_s:g} s: no rendezvous in {path}; look at "
        "the log of that process"
    )


def _take_rank(store: dist.Store, environment: WorkerEnvironment, deadline: Deadline) -> int:
    """Claim the launcher's rank; where it gave none, the lowest that nobody of the job claims."""
    size = environment.size
    assert size is not None
    arrival = store.add("arrivals", 1) - 1
    if arrival >= size:
        raise RunError(f"{arrival + 1} workers arrived, but the job has {size}: one is too many")
    claimed = -1 if environment.rank is None else environment.rank
    store.set(f"claim/{arrival}", str(claimed))
    rank = claimed if claimed >= 0 else _free_rank(store, arrival, size, deadline)
    if store.add(f"taken/{rank}", 1) > 1:
        _refuse(store, f"two workers claim rank {rank}; give each its own RANK_ID")
    store.set(f"place/{rank}", json.dumps(place_of_process()))
    return rank


def _free_rank(store: dist.Store, arrival: int, size: int, deadline: Deadline) -> int:
    """The n-th unclaimed rank, n being how many without one arrived before."""
    while not store.check([f"claim/{index}" for index in range(size)]):
        _check_nobody_failed(store, size)
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
    arrived = [index for index in range(size) if store.check([f"claim/{index}"])]
    claims = [int(store.get(f"claim/{index}")) for index in arrived]
    ranks = [str(claim) for claim in sorted(claims) if claim >= 0]
    where = f"within {deadline.timeout_s:g} s"
    if len(claims) == size or -1 not in claims:
        numbers = ", ".join(map(str, missing))
        return (
            f"rank {numbers} of {size} did not {verb} {where}; look at the logs of those processes"
        )
    listed = (
        f" (rank {', '.join(ranks)}, and {claims.count(-1)} without a RANK_ID)" if ranks else ""
    )
    return (
        f"only {len(arrived)} of {size} workers arrived {where}{listed}; look at the others' logs"
    )


def _wait_for_places(store: dist.Store, size: int, deadline: Deadline) -> list[Place]:
    return [json.loads(value) for value in wait_for(store, "place", size, deadline)]


def _refuse(store: dist.Store, problem: str) -> NoReturn:
    """The job cannot become whole: every rank ends with the same sentence."""
    store.set("refused", problem)
    # If the store lives here, the others have a moment to read it.
    time.sleep(10 * _POLL_S)
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


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
