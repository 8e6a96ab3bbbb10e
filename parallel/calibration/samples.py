"""The calibration samples, divided among the ranks so that their number changes no bit.

Each rank runs the whole layer on its samples, one at a time: what a sample gives depends on nothing
else. Samples are dealt out in blocks of a fixed size, block b to rank b % n, so that in round r the
ranks hold the blocks r * n .. r * n + n - 1, in their order. A sum is kept for each block by itself
and added to the total in block order, on any number of ranks; a maximum is exact in any order. Each
thread computes alone, as the bits of a product may depend on the number of its threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.calibration.forward import LayerForward
from parallel.group import Group
from quant.calibrate import Observer, Reduced
from quant.methods.layer import BLOCK_ROWS, Layer, Rounded, blocks
from quant.numeric import Grid

T = TypeVar("T")
R = TypeVar("R")

# Rows of a sum that travel at a time; a Hessian may have gigabytes.
STRIP_ROWS = 512


class Threads:
    """Threads of this rank, each of which computes alone; results come in the order of the items."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        return self._pool.map(function, items)


@contextmanager
def lone_threads(num_threads: int | None) -> Iterator[Threads]:
    """So many threads, torch's own number if None; the caller computes alone meanwhile too."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        num_threads or before, initializer=torch.set_num_threads, initargs=(1,)
    )
    torch.set_num_threads(1)
    try:
        yield Threads(pool)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def deal(num_samples: int, block_samples: int, group: Group) -> list[range]:
    """This rank's block of each round, in which every rank takes part; a last one may be empty."""
    num_blocks = -(-num_samples // block_samples)
    num_rounds = -(-num_blocks // group.size)
    starts = [(r * group.size + group.rank) * block_samples for r in range(num_rounds)]
    return [range(start, max(start, min(start + block_samples, num_samples))) for start in starts]


class RankSamples:
    """A rank's samples and its part in what a method asks of all (quant.methods.ptq.Samples).

    Args:
        hidden: the residual stream before the layer, [T, D], of each of this rank's samples.
        rounds: `deal`'s.
        num_samples: of all ranks.
    """

    def __init__(
        self,
        group: Group,
        forward: LayerForward,
        threads: Threads,
        hidden: dict[int, Tensor],
        rounds: list[range],
        num_samples: int,
    ) -> None:
        self.group = group
        self.forward = forward
        self.threads = threads
        self.hidden = hidden
        self.rounds = rounds
        self.num_samples = num_samples

    def outputs(self, layer: Layer) -> Iterator[tuple[int, Tensor]]:
        """Each of this rank's samples, and its residual stream after the layer."""
        indices = sorted(self.hidden)
        run = self.threads.map(lambda index: self.forward.run(layer, self.hidden[index]), indices)
        yield from zip(indices, run, strict=True)

    def observe(
        self, layer: Layer, makers: Mapping[str, Callable[[], Observer]]
    ) -> dict[str, Reduced]:
        observers = {name: make() for name, make in makers.items()}
        totals = {
            name: {key: torch.zeros_like(tensor) for key, (tensor, _) in observer.state().items()}
            for name, observer in observers.items()
        }
        for samples in self.rounds:
            self._fill(layer, observers, samples)
            for name, observer in observers.items():
                self._add(totals[name], observer)
        return dict(totals)

    def judge(self, layer: Layer, block: str) -> Callable[[Layer], float]:
        inputs = self._each(lambda x_TD: self.forward.block_input(layer, block, x_TD), self.hidden)
        truths = self._each(lambda x_TD: self.forward.block(layer, block, x_TD), inputs)

        def loss(changed: Layer) -> float:
            def error(index: int) -> float:
                out_TD = self.forward.block(changed, block, inputs[index])
                return float((out_TD.double() - truths[index].double()).square().sum())

            errors = dict(zip(inputs, self.threads.map(error, inputs), strict=True))
            return sum(self.by_sample({i: [e] for i, e in errors.items()}, 1)[:, 0].tolist())

        return loss

    def by_sample(self, numbers: Mapping[int, list[float]], width: int) -> Tensor:
        """float64 [samples of all ranks, width]: exact, as only one rank has each row."""
        table_SN = torch.zeros(self.num_samples, width, dtype=torch.float64)
        for index, row in numbers.items():
            table_SN[index] = torch.tensor(row, dtype=torch.float64)
        return self.group.all_reduce(table_SN)

    def round(
        self,
        shape: tuple[int, int],
        grid: Grid,
        scale_dtype: torch.dtype,
        round_block: Callable[[slice], Rounded],
    ) -> Rounded:
        num_groups = -(-shape[1] // grid.group_size) if grid.group_size else 1
        values_NK = torch.empty(shape, dtype=torch.int8)
        scale_NG = torch.empty(shape[0], num_groups, dtype=scale_dtype)
        todo, size = blocks(shape[0]), self.group.size
        mine = self.threads.map(round_block, todo[self.group.rank :: size])
        for first in range(0, len(todo), size):
            shared = todo[first : first + size]
            block = next(mine) if self.group.rank < len(shared) else None
            for rows, values_RK, scale_RG in self._exchange(block, shape[1], num_groups, shared):
                values_NK[rows], scale_NG[rows] = values_RK, scale_RG.to(scale_dtype)
        return Rounded(values_NK, scale_NG, grid.group_size)

    def _exchange(
        self, mine: Rounded | None, num_columns: int, num_groups: int, shared: list[slice]
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The blocks of this round from their ranks. Scales travel as float32, which holds any."""
        values_RK = (
            torch.empty(0, num_columns, dtype=torch.int8) if mine is None else mine.values_NK
        )
        scale_RG = torch.empty(0, num_groups) if mine is None else mine.scale_NG.float()
        missing = (0, 0, 0, BLOCK_ROWS - len(values_RK))
        all_values = self.group.all_gather(F.pad(values_RK, missing))
        all_scales = self.group.all_gather(F.pad(scale_RG, missing))
        for rows, values, scales in zip(shared, all_values, all_scales, strict=False):
            count = rows.stop - rows.start
            yield rows, values[:count], scales[:count]

    def _fill(self, layer: Layer, observers: Mapping[str, Observer], samples: range) -> None:
        """Show a block's samples to the observers, in their order."""

        def inputs(index: int) -> dict[str, Tensor]:
            kept: dict[str, Tensor] = {}

            def keep(name: str, x: Tensor) -> None:
                if name in observers:
                    kept[name] = x

            self.forward.run(layer, self.hidden[index], keep)
            return kept

        for kept in self.threads.map(inputs, samples):
            for name, observer in observers.items():
                observer.update(kept.pop(name))

    def _add(self, totals: dict[str, Tensor], observer: Observer) -> None:
        """Take the ranks' blocks of a round up into the totals, and start the observer anew."""
        for key, (tensor, op) in observer.state().items():
            if op == "max":
                found = self.group.all_reduce(tensor.clone(), "max")
                torch.maximum(totals[key], found, out=totals[key])
            else:
                for strip, total in zip(
                    tensor.split(STRIP_ROWS), totals[key].split(STRIP_ROWS), strict=True
                ):
                    for part in self.group.all_gather(strip):
                        total.add_(part)
            tensor.zero_()

    def _each(
        self, function: Callable[[Tensor], Tensor], tensors: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        found = self.threads.map(function, tensors.values())
        return dict(zip(tensors, found, strict=True))
