"""How a rank takes its seat: bound to its cores, with its threads, as the system reads it back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.host.cores import Seat, divide
from launcher.host.topology import (
    Topology,
    allowed_cpus,
    format_cpus,
    memory_by_node,
    read_topology,
)
from launcher.host.wishes import Wishes


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
