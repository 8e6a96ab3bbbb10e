"""Which cores a rank runs on, and with how many threads.

The ranks of a host that may use the same cores divide them: whole physical cores, of one NUMA node
where they fit. What somebody else decided stands: a narrower affinity (taskset, srun, mpirun), a
container's quota, OMP_NUM_THREADS. Every rank computes the division for itself, from the same facts.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.environment.ancestry import launching_pid, was_set_by
from launcher.host.topology import (
    Topology,
    allowed_cpus,
    format_cpus,
    memory_by_node,
    read_topology,
)

# With these OpenMP binds its threads itself.
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_UNBOUND = ("", "false", "none", "disabled")
_TORCHRUNS_OWN = (
    "torchrun set OMP_NUM_THREADS=1 by itself: not used, the ranks divide the cores "
    "(parallel.threads=1 keeps it)"
)


@dataclass(frozen=True)
class Wishes:
    """What the user, or the launcher in the user's name, said of threads and cores.

    Attributes:
        threads: of each rank; None divides the cores.
        floating: why ranks are not bound to cores; empty where they are.
        openmp_binds: variables tell OpenMP to bind its threads itself.
        note: what the user should know.
    """

    threads: int | None = None
    floating: str = ""
    openmp_binds: bool = False
    note: str = ""


@dataclass(frozen=True)
class Seat:
    """A rank's logical CPUs and its number of threads.

    Attributes:
        floating: why the rank is not bound to cores of its own; empty where it is.
    """

    cpus: frozenset[int]
    threads: int
    floating: str = ""

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        where = f"cores {format_cpus(self.cpus)}"
        return f"{threads} on {where}" + (f", not bound: {self.floating}" if self.floating else "")


def torchrun_set_threads(environ: Mapping[str, str]) -> bool:
    """Whether OMP_NUM_THREADS=1 is torchrun's own: where the user set none, it sets 1 for all."""
    is_under_torchrun = "TORCHELASTIC_RUN_ID" in environ
    return is_under_torchrun and was_set_by(launching_pid(environ), "OMP_NUM_THREADS")


def read_wishes(
    threads: int | None,
    pin: bool,
    environ: Mapping[str, str],
    is_torchruns: Callable[[Mapping[str, str]], bool] = torchrun_set_threads,
) -> Wishes:
    """Wishes of the configuration first, then those of the environment.

    Args:
        is_torchruns: whether torchrun, not the user, set OMP_NUM_THREADS.
    """
    bound = [name for name in _BINDING if environ.get(name, "").lower() not in _UNBOUND]
    floating = f"{bound[0]} is set" if bound else "" if pin else "parallel.pin is false"
    if not hasattr(os, "sched_setaffinity"):
        floating = "this system binds no process to cores"
    wishes = Wishes(threads, floating, openmp_binds=bool(bound))
    first = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if threads is not None or not first.isdecimal() or int(first) < 1:
        return wishes
    if first == "1" and is_torchruns(environ):
        return replace(wishes, note=_TORCHRUNS_OWN)
    return replace(wishes, threads=int(first))


def divide(topology: Topology, allowed: Sequence[frozenset[int]], wishes: Wishes) -> list[Seat]:
    """A seat for each rank of a host.

    Args:
        allowed: for each rank the logical CPUs that it may use. Ranks with equal ones divide them;
            one with its own was bound by its launcher and keeps them.
    """
    sharers: dict[frozenset[int], list[int]] = defaultdict(list)
    for rank, cpus in enumerate(allowed):
        sharers[cpus].append(rank)
    seats: dict[int, Seat] = {}
    for cpus, ranks in sharers.items():
        if any(cpus & other for other in sharers if other != cpus):
            seats.update((rank, _overlapping(topology, allowed, cpus)) for rank in ranks)
        else:
            seats.update(zip(ranks, _deal(topology, cpus, len(ranks)), strict=True))
    num_cores = len(topology.physical_cores(frozenset().union(*allowed)))
    return [
        _heed(_limit(seats[rank], topology.quota, num_cores, len(allowed)), allowed[rank], wishes)
        for rank in range(len(allowed))
    ]


def _deal(topology: Topology, cpus: frozenset[int], num_ranks: int) -> list[Seat]:
    """Divide cores evenly: ranks wait for the slowest, so a core more for some helps nobody."""
    cores = topology.physical_cores(cpus)
    if len(cores) < num_ranks:
        return [Seat(cpus, 1, "fewer cores than ranks")] * num_ranks
    if num_ranks == 1:
        return [Seat(cpus, len(cores))]
    share = len(cores) // num_ranks
    if topology.has_small_cores:
        return [Seat(cpus, share, "cores of two sizes")] * num_ranks
    parts = _parts(topology, cores, num_ranks, share)
    return [Seat(frozenset().union(*part), share) for part in parts]


def _parts(
    topology: Topology, cores: list[frozenset[int]], num_ranks: int, share: int
) -> list[list[frozenset[int]]]:
    """Shares within a node first, on the node with most room; what is left over spans nodes."""
    free: dict[int, list[frozenset[int]]] = defaultdict(list)
    for core in cores:
        free[topology.node_of(core)].append(core)
    room = Counter({node: len(own) for node, own in sorted(free.items())})
    counts: Counter[int] = Counter()
    for _ in range(num_ranks):
        node, most = room.most_common(1)[0]
        if most >= share:
            counts[node] += 1
            room[node] -= share
    cuts = [(node, at * share) for node in sorted(free) for at in range(counts[node])]
    parts = [free[node][at : at + share] for node, at in cuts]
    rest = [core for node in sorted(free) for core in free[node][counts[node] * share :]]
    spanning = range(num_ranks - len(parts))
    return parts + [rest[at * share : (at + 1) * share] for at in spanning]


def _overlapping(
    topology: Topology, allowed: Sequence[frozenset[int]], cpus: frozenset[int]
) -> Seat:
    """Sets that overlap without being equal: each core counts by how many ranks may use it."""
    users = [sum(bool(core & other) for other in allowed) for core in topology.physical_cores(cpus)]
    threads = max(1, int(sum(1 / count for count in users)))
    return Seat(cpus, threads, "its cores overlap with other ranks'")


def _limit(seat: Seat, quota: float | None, num_cores: int, num_ranks: int) -> Seat:
    """A quota is time, not cores: more threads would be stopped, and other containers sit there."""
    if quota is None or quota >= num_cores:
        return seat
    threads = min(seat.threads, max(1, int(quota / num_ranks)))
    floating = f"a quota of {quota:g} cores' time says not which cores"
    return replace(seat, threads=threads, floating=seat.floating or floating)


def _heed(seat: Seat, allowed: frozenset[int], wishes: Wishes) -> Seat:
    """The user's number of threads, and the whole of the allowed CPUs where a rank floats."""
    threads = wishes.threads or seat.threads
    floating = wishes.floating or seat.floating
    if not floating and threads > len(seat.cpus):
        floating = f"{threads} threads were asked for, more than its share of the cores"
    return Seat(allowed if floating else seat.cpus, threads, floating)


@dataclass(frozen=True)
class Taken:
    """A rank's seat as the system reads it back.

    Attributes:
        refused: the system's words, where it did not bind the rank to its cores.
    """

    seat: Seat
    topology: Topology
    refused: str = ""

    def report(self) -> dict[str, object]:
        """For report.json: where the rank runs now, and on which nodes its memory lies, in bytes."""
        import torch

        cpus = allowed_cpus()
        return {
            "cores": format_cpus(cpus),
            "threads": torch.get_num_threads(),
            "numa_nodes": self.topology.nodes_of(cpus),
            "memory_by_node": memory_by_node(),
            "floating": self.refused or self.seat.floating,
        }


def take_seat(allowed: Sequence[frozenset[int]], index: int, wishes: Wishes) -> Taken:
    """Bind this thread, and so those that it starts later, to its share of the cores.

    Call it before the first tensor operation: OpenMP's threads inherit the affinity as they start,
    and memory lies on the node of the thread that first touches it.
    """
    import torch

    topology = read_topology(frozenset().union(*allowed))
    seat = divide(topology, allowed, wishes)[index]
    if wishes.openmp_binds and wishes.threads is None:
        # It may have bound this thread to one core already; it counted before that.
        seat = replace(seat, threads=max(seat.threads, torch.get_num_threads() // len(allowed)))
    refused = "" if seat.floating else _bind(seat.cpus)
    # After it: setting the number starts threads.
    torch.set_num_threads(seat.threads)
    return Taken(seat, topology, refused)


def _bind(cpus: frozenset[int]) -> str:
    """Returns why the system did not, and an empty string where it did, as read back."""
    if cpus == allowed_cpus():
        return ""
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        return f"binding to cores {format_cpus(cpus)} failed ({error.strerror})"
    found = allowed_cpus()
    return "" if found == cpus else f"the system kept it on cores {format_cpus(found)}"
