"""A store whose port is not known before: rank 0 takes a free one and leaves it in a file.

All ranks are on this host, and only those of this job look for the file.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from launcher.environment.worker import WorkerEnvironment
from launcher.failures import RunError
from launcher.ranks.deadline import Deadline
from launcher.ranks.place import is_here, is_running, place_of_process
from launcher.ranks.tcp_store import LOOPBACK, tcp_store

_POLL_S = 0.02


@contextmanager
def cleared_announcement(environment: WorkerEnvironment) -> Iterator[None]:
    """The file is gone once all have arrived, or have given up."""
    try:
        yield
    finally:
        if environment.store is None and environment.rank == 0:
            environment.announcement.unlink(missing_ok=True)


def announced_store(path: Path, is_host: bool, deadline: Deadline) -> dist.Store:
    """Open a store on a free port and announce it, or connect to the one announced.

    Raises:
        RunError: rank 0 announces nothing before the deadline.
    """
    if not is_host:
        return tcp_store(LOOPBACK, _announced_port(path, deadline), False, deadline)
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
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
