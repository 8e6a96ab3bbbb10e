"""How the ranks of a job meet: one store, a rank for each, and a deadline that names who is missing.

The store is a TCPStore. Its host is torchrun's agent, the agent of our own start, MindSpore's
scheduler process, or rank 0 (Slurm, MPI). There is no constant port: rank 0 takes a free one and
leaves it in a file that only this job's ranks look for.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher.environment import WorkerEnvironment
from launcher.failures import RunError

_POLL_S = 0.02

Place = dict[str, str | int]


@dataclass(frozen=True)
class Member:
    """A rank that has arrived, where it runs, and the store they all share."""

    store: dist.Store
    rank: int
    size: int
    local_rank: int
    places: list[Place]
    is_one_host: bool
    hosts_store: bool


def open_store(environment: WorkerEnvironment, timeout_s: float) -> dist.Store:
    """Connect to the job's store, or host it where that is this process's part.

    Raises:
        RunError: nobody hosts the store within the deadline, or its port is taken.
    """
    if environment.store is None:
        store = _file_announced_store(environment, timeout_s)
    else:
        host, _, port = environment.store.rpartition(":")
        store = _tcp_store(host, int(port), hosts_store(environment), timeout_s)
    # A job's own prefix: whoever reaches a neighbour's store by mistake meets nobody there.
    return dist.PrefixStore(f"shardrun/{environment.job}", store)


def join(environment: WorkerEnvironment, timeout_s: float) -> Member:
    """Arrive, get a rank where the launcher gave none, and wait for the others.

    Raises:
        RunError: ranks are missing at the deadline, or two processes claim one rank.
    """
    assert environment.size is not None
    store = open_store(environment, timeout_s)
    rank = _take_rank(store, environment, timeout_s)
    places = _wait_for_all(store, environment.size, timeout_s)
    hosts = [place["host"] for place in places]
    neighbours = [other for other in range(environment.size) if hosts[other] == hosts[rank]]
    local_rank = environment.local_rank
    return Member(
        store=store,
        rank=rank,
        size=environment.size,
        local_rank=neighbours.index(rank) if local_rank is None else local_rank,
        places=places,
        is_one_host=len(set(hosts)) == 1,
        hosts_store=hosts_store(environment),
    )


def host_until_done(environment: WorkerEnvironment, timeout_s: float) -> int:
    """MindSpore's scheduler process: host the store until every worker has ended.

    Returns:
        0 if all ended well, else 1.
    """
    assert environment.size is not None
    store = open_store(environment, timeout_s)
    places = _wait_for_all(store, environment.size, timeout_s)
    ends = wait_for_ends(store, places)
    return int(any(end is None or end["status"] for end in ends))


def say_ended(member: Member, status: int, cause: str) -> None:
    """Tell the others how this rank ended, and why if the failure began here.

    The rank that hosts the store stays until the others have ended too.
    """
    try:
        member.store.set(f"ended/{member.rank}", json.dumps({"status": status, "cause": cause}))
    except (RuntimeError, dist.DistError):
        return  # the host of the store is gone: nobody is left to be told
    if member.hosts_store:
        wait_for_ends(member.store, member.places)


def wait_for_ends(store: dist.Store, places: list[Place]) -> list[dict[str, Any] | None]:
    """How each rank ended; None for one that went without a word."""
    ends = [read_end(store, rank) for rank in range(len(places))]
    while any(end is None and is_alive(places[rank]) for rank, end in enumerate(ends)):
        time.sleep(_POLL_S)
        ends = [read_end(store, rank) for rank in range(len(places))]
    return ends


def read_end(store: dist.Store, rank: int) -> dict[str, Any] | None:
    """What `say_ended` left for a rank: its `status` and its `cause`."""
    key = f"ended/{rank}"
    return json.loads(store.get(key)) if store.check([key]) else None


def is_alive(place: Place) -> bool:
    """Whether a process of this host lives; one of another host is believed to."""
    if place["host"] != socket.gethostname():
        return True
    return process_start(int(place["pid"])) == place["started"]


def place_of_process() -> Place:
    """Where this process runs, in terms that outlive it: a pid alone may be used again."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": process_start(pid)}


def process_start(pid: int) -> int:
    """The start time of a living process in clock ticks; 0 if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def hosts_store(environment: WorkerEnvironment) -> bool:
    """Whether the store lives in this process, and so must outlive the other ranks' use of it."""
    if environment.launcher == "torchrun":
        # Its agent hosts one already, unless an old torchrun leaves that to rank 0.
        uses_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return environment.rank == 0 and not uses_agent
    if environment.launcher == "mindspore":
        return environment.is_scheduler
    return environment.rank == 0


def _tcp_store(host: str, port: int, is_host: bool, timeout_s: float) -> dist.Store:
    # wait_for_workers=False: torch's own wait would not say who is missing.
    try:
        return dist.TCPStore(
            host,
            port,
            is_master=is_host,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except (RuntimeError, dist.DistError) as error:
        action = "open" if is_host else "reach"
        reason = str(error).partition("\n")[0][:200]
        raise RunError(
            f"could not {action} the rendezvous at {host}:{port} within {timeout_s:g} s ({reason})"
        ) from error


def _file_announced_store(environment: WorkerEnvironment, timeout_s: float) -> dist.Store:
    """All ranks are on this host: rank 0 takes a free port and writes it where the others look."""
    path = Path(tempfile.gettempdir()) / f"shardrun-{os.getuid()}-{environment.job}.json"
    if environment.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"port": store.port, **place_of_process()}))
        partial.rename(path)
        return store
    port = _announced_port(path, time.monotonic() + timeout_s)
    return _tcp_store("127.0.0.1", port, False, timeout_s)


def _announced_port(path: Path, deadline: float) -> int:
    """Wait for rank 0's file; one that a dead process left is not believed."""
    while time.monotonic() < deadline:
        try:
            announced = json.loads(path.read_text())
        except (OSError, ValueError):
            announced = None
        if announced and process_start(announced["pid"]) == announced["started"]:
            return int(announced["port"])
        time.sleep(_POLL_S)
    raise RunError(f"rank 0 did not start: no rendezvous in {path} before the deadline")


def _take_rank(store: dist.Store, environment: WorkerEnvironment, timeout_s: float) -> int:
    """Claim the launcher's rank; where it gave none, the lowest that nobody of the job claims."""
    size = environment.size
    assert size is not None
    arrival = store.add("arrivals", 1) - 1
    if arrival >= size:
        raise RunError(f"{arrival + 1} workers arrived, but the job has {size}: one is too many")
    claimed = -1 if environment.rank is None else environment.rank
    store.set(f"claim/{arrival}", str(claimed))
    rank = claimed if claimed >= 0 else _free_rank(store, arrival, size, timeout_s)
    if store.add(f"taken/{rank}", 1) > 1:
        raise RunError(f"two workers claim rank {rank}; give each its own RANK_ID")
    store.set(f"place/{rank}", json.dumps(place_of_process()))
    return rank


def _free_rank(store: dist.Store, arrival: int, size: int, timeout_s: float) -> int:
    """The n-th unclaimed rank, n being how many without one arrived before."""
    claims = [int(value) for value in _wait_for("claim", store, size, timeout_s)]
    free = sorted(set(range(size)) - set(claims))
    return free[claims[:arrival].count(-1)]


def _wait_for_all(store: dist.Store, size: int, timeout_s: float) -> list[Place]:
    return [json.loads(value) for value in _wait_for("place", store, size, timeout_s)]


def _wait_for(what: str, store: dist.Store, size: int, timeout_s: float) -> list[bytes]:
    """The values of `what/0` to `what/size-1`.

    Raises:
        RunError: names the ranks that are missing at the deadline, or one that died while waiting.
    """
    deadline = time.monotonic() + timeout_s
    missing = list(range(size))
    try:
        while missing := [rank for rank in missing if not store.check([f"{what}/{rank}"])]:
            _check_arrived(store, size)
            if time.monotonic() > deadline:
                numbers = ", ".join(map(str, missing))
                raise RunError(
                    f"rank {numbers} of {size} did not arrive within {timeout_s:g} s; "
                    "look at the logs of those processes"
                )
            time.sleep(_POLL_S)
        return [store.get(f"{what}/{rank}") for rank in range(size)]
    except dist.DistError as error:
        raise RunError("the rendezvous is gone: the process that hosts it ended") from error


def _check_arrived(store: dist.Store, size: int) -> None:
    for rank in range(size):
        if store.check([f"place/{rank}"]):
            place = json.loads(store.get(f"place/{rank}"))
            if not is_alive(place) and read_end(store, rank) is None:
                raise RunError(
                    f"rank {rank} (host {place['host']}, pid {place['pid']}) ended without a word "
                    "while others had not arrived yet"
                )
