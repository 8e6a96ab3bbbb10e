"""The process that hosts the store of a plain run.

The server's threads hold locks of the C library now and then: a process that has them must not fork.
"""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.connection import Connection

import torch.distributed as dist

from launcher.ranks.signals import SIGNALS, die_with_parent, ignore
from launcher.ranks.tcp_store import LOOPBACK


def start_store_process() -> int:
    """Fork it, before there are threads; returns the port of the store."""
    ours, its = multiprocessing.Pipe(duplex=False)
    host = multiprocessing.get_context("fork").Process(target=_host_store, args=(its,), daemon=True)
    host.start()
    its.close()
    port: int = ours.recv()
    return port


def _host_store(pipe: Connection) -> None:
    """Until the agent ends, which takes this along."""
    ignore(SIGNALS)
    die_with_parent()
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    while True:
        signal.pause()
