"""TorchGroup: one process a rank, over torch.distributed: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.group import ProcessGroup, reduce_into


class TorchGroup(ProcessGroup):
    """The ranks of a process group of torch.distributed.

    Args:
        members: the process group; default: that of all ranks.
    """

    def __init__(self, describe_failure: Callable[[str], str] = str, members: Any = None) -> None:
        super().__init__(dist.get_rank(members), dist.get_world_size(members), describe_failure)
        self._members = members

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        x = x.contiguous()
        if op == "max":  # gloo's own would lose a NaN
            reduce_into(x, self._all_gather(x), op)
        else:
            dist.all_reduce(x, dist.ReduceOp.SUM, group=self._members)
        return x

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self._members)
        return parts

    def _gather(self, x: Tensor) -> list[Tensor] | None:
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x.contiguous(), parts, group=self._members, group_dst=0)
        return parts

    def _broadcast(self, x: Tensor, source: int) -> Tensor:
        x = x.contiguous()
        dist.broadcast(x, group=self._members, group_src=source)
        return x

    def _send(self, x: Tensor, destination: int) -> None:
        dist.send(x.contiguous(), group=self._members, group_dst=destination)

    def _recv(self, x: Tensor, source: int) -> Tensor:
        dist.recv(x, group=self._members, group_src=source)
        return x

    def _barrier(self) -> None:
        dist.barrier(self._members)
