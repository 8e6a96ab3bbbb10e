"""How the ranks of a job meet, and how each takes its leave."""

from __future__ import annotations

import sys
import threading
from typing import TextIO

import torch.distributed as dist

from launcher.environment.worker import WorkerEnvironment
from launcher.ranks.announced_store import cleared_announcement
from launcher.ranks.arrival import take_rank, wait_for_places
from launcher.ranks.deadline import arrival_deadline
from launcher.ranks.member import Member
from launcher.ranks.notice import Notice
from launcher.ranks.place import is_here
from launcher.ranks.presence import GRACE_S, Presence, write_end
from launcher.ranks.store import hosts_store, named_store_errors, open_store, store_host


def join(environment: WorkerEnvironment, timeout_s: float, console: TextIO | None = None) -> Member:
    """Arrive, get a rank where the launcher gave none, and wait for the others.

    Args:
        console: where waits are said; default: stderr.

    Raises:
        RunError: ranks are missing at the deadline, two processes claim one rank, or the store or
            its host is gone.
    """
    assert environment.size is not None
    deadline = arrival_deadline(environment, timeout_s)
    console = console or sys.stderr
    who = "a worker" if environment.rank is None else f"rank {environment.rank}"
    notice = Notice(console, who, deadline)
    with cleared_announcement(environment), named_store_errors(environment), notice.given():
        store = open_store(environment, deadline, notice)
        notice.elect(store, "arrival")
        rank = take_rank(store, environment, deadline, notice)
        places = wait_for_places(store, environment.size, deadline, notice)
    here = [other for other, place in enumerate(places) if is_here(place)]
    return Member(
        store=store,
        rank=rank,
        size=environment.size,
        local_rank=here.index(rank) if environment.local_rank is None else environment.local_rank,
        places=places,
        hosts_store=hosts_store(environment),
        store_host=store_host(environment),
        console=console,
    )


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
            notice = Notice(member.console, f"rank {member.rank}", None)
            Presence(member.store, member.places).wait_for_ends(notice)
    except dist.DistError:
        return  # the host of the store is gone: nobody is left to be told
