"""The rendezvous of an agent that has no others: no delay, no thread, no messages."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from launcher.ranks.tcp_store import LOOPBACK


class Alone(RendezvousHandler):
    """One agent, node 0 of 1.

    Args:
        port: of the store, on this host.
    """

    def __init__(self, port: int, run_id: str) -> None:
        self._port = port
        self._run_id = run_id

    def get_backend(self) -> str:
        return "alone"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        store = dist.TCPStore(LOOPBACK, self._port, is_master=False)
        place = RendezvousStoreInfo(LOOPBACK, self._port)
        return RendezvousInfo(store, 0, 1, place)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None: ...

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True
