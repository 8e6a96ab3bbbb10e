"""The store of a job, which one process hosts and all ranks share.

The host is torch elastic's agent (torchrun's, or that of our own start), MindSpore's scheduler
process, or rank 0 (Slurm, MPI). There is no constant port: where the launcher names none, rank 0
announces its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from launcher.environment import mindspore
from launcher.environment.torchrun import TORCHRUN
from launcher.environment.worker import WorkerEnvironment
from launcher.failures import RunError
from launcher.ranks.announced_store import announced_store
from launcher.ranks.deadline import Deadline
from launcher.ranks.notice import Notice
from launcher.ranks.tcp_store import first_line, tcp_store


def hosts_store(environment: WorkerEnvironment) -> bool:
    """Whether the store lives in this process, and so must outlive the other ranks' use of it."""
    if environment.launcher == TORCHRUN.name:
        # Its agent hosts one already, unless an old torchrun leaves that to rank 0.
        return environment.rank == 0 and not _uses_agent_store()
    if environment.launcher == mindspore.NAME:
        return environment.is_scheduler
    return environment.rank == 0


def store_host(environment: WorkerEnvironment) -> str:
    """Who hosts the store, in words."""
    if environment.launcher == mindspore.NAME:
        return "the scheduler"
    return "torch elastic's agent" if _uses_agent_store() else "rank 0"


def open_store(environment: WorkerEnvironment, deadline: Deadline, notice: Notice) -> dist.Store:
    """Connect to the job's store, or host it where that is this process's part.

    Args:
        notice: is told whose answer is missing.

    Raises:
        RunError: nobody hosts the store before the deadline, or its port is taken.
    """
    if not hosts_store(environment):
        place = environment.store or environment.announcement
        notice.whom = f"{store_host(environment)} to open the rendezvous ({place})"
        # Others that wait for it are unknown; but what ranks say whom a launcher starts is collected.
        notice.speaks = environment.launcher == mindspore.NAME or environment.rank == 1
    if environment.store is None:
        store = announced_store(environment.announcement, environment.rank == 0, deadline)
    else:
        host, _, port = environment.store.rpartition(":")
        store = tcp_store(host, int(port), hosts_store(environment), deadline)
    # A job's own prefix: whoever reaches a neighbour's store by mistake meets nobody there.
    return dist.PrefixStore(f"shardrun/{environment.job}", store)


@contextmanager
def named_store_errors(environment: WorkerEnvironment) -> Iterator[None]:
    """A RunError that names the host, where the store was gone."""
    try:
        yield
    except dist.DistError as error:
        raise RunError(
            f"the rendezvous is gone: {store_host(environment)}, which hosts it, ended "
            f"({first_line(error)})"
        ) from error


def _uses_agent_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
