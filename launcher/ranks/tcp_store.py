"""A TCPStore at a known address: opened by the process that hosts it, reached by all others."""

from __future__ import annotations

import socket
import time
from datetime import timedelta

import torch.distributed as dist

from launcher.failures import RunError
from launcher.ranks.deadline import Deadline

_KNOCK_S = 0.1
LOOPBACK = "127.0.0.1"


def tcp_store(host: str, port: int, is_host: bool, deadline: Deadline) -> dist.Store:
    """Open the store, or connect to it.

    Raises:
        RunError: its port is taken, or nobody listens there before the deadline.
    """
    if not is_host:
        _wait_for_listener(host, port, deadline)
    # The host itself needs no name that others know it by, and listens on all its addresses.
    # wait_for_workers=False: torch's own wait would not say who is missing.
    try:
        return dist.TCPStore(
            LOOPBACK if is_host else host,
            port,
            is_master=is_host,
            timeout=timedelta(seconds=deadline.remaining_s),
            wait_for_workers=False,
        )
    except (RuntimeError, dist.DistError) as error:
        action = "open" if is_host else "reach"
        raise RunError(
            f"could not {action} the rendezvous at {host}:{port} ({first_line(error)})"
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
        time.sleep(_KNOCK_S)


def first_line(error: BaseException) -> str:
    """Of torch's messages, which go on with a trace of C++."""
    return str(error).partition("\n")[0][:200]
