"""Which cores a rank runs on, and with how many threads.

The ranks of a host that may use the same cores divide them: whole physical cores, of one NUMA node
where they fit. What somebody else decided stands: a narrower affinity (taskset, srun, mpirun), a
container's quota, OMP_NUM_THREADS. Every rank computes the division for itself, from the same facts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.host.topology import Topology, format_cpus
from launcher.host.wishes import Wishes


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
