"""TwoLevelGroup: ranks on several hosts, some of them several on one.

What ranks of one host can settle among themselves does not cross the network: the lowest rank of
each host, its leader, speaks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from parallel.group import Group, ProcessGroup, reduce_into


class TwoLevelGroup(ProcessGroup):
    """All ranks of a job, over a group inside each host and one between the hosts.

    Args:
        hosts: the number of each rank's host; hosts are numbered in the order of their lowest rank.
        inside: the ranks of this host, in rank order.
        between: the leaders, in the order of their hosts; None on a rank that is none.
        world: all ranks, for what goes from one to one.
    """

    def __init__(
        self,
        hosts: Sequence[int],
        inside: Group,
        between: Group | None,
        world: Group,
        describe_failure: Callable[[str], str] = str,
    ) -> None:
        super().__init__(world.rank, world.size, describe_failure)
        self._host = hosts[world.rank]
        self._hosts = hosts
        self._ranks_of = [
            [rank for rank, own in enumerate(hosts) if own == host]
            for host in range(max(hosts) + 1)
        ]
        self._inside = inside
        self._between = between
        self._world = world

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        """Added up inside each host in rank order, then in the order of the hosts."""
        if op == "sum" and x.dtype in (torch.bfloat16, torch.float16):
            return self._all_reduce(x.float(), op).to(x.dtype)  # rounded once
        x = self._inside._all_reduce(x.contiguous(), op)
        if self._between is not None:
            reduce_into(x, self._between._all_gather(x), op)
        return self._inside._broadcast(x, 0)

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        parts = self._inside._gather(x)
        whole = torch.empty(self.size, *x.shape, dtype=x.dtype)
        if parts is not None and self._between is not None:
            self._fill(whole, self._between._all_gather(self._padded(parts)))
        return list(self._inside._broadcast(whole, 0).unbind(0))

    def _gather(self, x: Tensor) -> list[Tensor] | None:
        parts = self._inside._gather(x)
        if parts is None or self._between is None:
            return None
        hosts = self._between._gather(self._padded(parts))
        if hosts is None:
            return None
        self._fill(whole := torch.empty(self.size, *x.shape, dtype=x.dtype), hosts)
        return list(whole.unbind(0))

    def _padded(self, parts: Sequence[Tensor]) -> Tensor:
        """A host's parts, as many rows as the host with the most ranks has."""
        stacked = torch.stack(list(parts))
        widest = max(len(ranks) for ranks in self._ranks_of)
        return torch.cat([stacked, stacked.new_zeros(widest - len(parts), *stacked.shape[1:])])

    def _fill(self, whole: Tensor, hosts: Sequence[Tensor]) -> None:
        """Put what the hosts gathered where each rank's part belongs."""
        for ranks, part in zip(self._ranks_of, hosts, strict=True):
            whole[ranks] = part[: len(ranks)]

    def _broadcast(self, x: Tensor, source: int) -> Tensor:
        home, x = self._hosts[source], x.contiguous()
        if self._host == home:
            x = self._inside._broadcast(x, self._ranks_of[home].index(source))
        if self._between is not None:
            x = self._between._broadcast(x, home)
        return x if self._host == home else self._inside._broadcast(x, 0)

    def _send(self, x: Tensor, destination: int) -> None:
        if self._hosts[destination] == self._host:
            self._inside._send(x, self._ranks_of[self._host].index(destination))
        else:
            self._world._send(x, destination)

    def _recv(self, x: Tensor, source: int) -> Tensor:
        if self._hosts[source] == self._host:
            return self._inside._recv(x, self._ranks_of[self._host].index(source))
        return self._world._recv(x, source)

    def _barrier(self) -> None:
        self._inside._barrier()
        if self._between is not None:
            self._between._barrier()
        self._inside._barrier()
