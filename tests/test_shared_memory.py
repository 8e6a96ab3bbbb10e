"""Groups of processes on one host: real processes against the sums of one."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from parallel.collectives.segment import Segment, SegmentError
from parallel.collectives.shared_memory import ONE_SHOT_BYTES, SegmentLayout, SharedMemoryGroup
from parallel.errors import PeerError
from parallel.group import Group, reduce_into

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.test_shared_memory"])
Work = Callable[[Group], Any]


def be_rank(
    rank: int, size: int, path: str, timeout_s: float, is_crowded: bool, work: Work, pipe: Connection
) -> None:
    """A process of its own: one rank, whose result or error goes to the test."""
    torch.set_num_threads(1)
    segment = Segment.attach(path, SegmentLayout(size).num_bytes)
    pipe.send(os.getpid())
    pids = pipe.recv()
    group = SharedMemoryGroup(
        rank, size, segment, timeout_s, lambda other: is_alive(pids[other]), is_crowded=is_crowded
    )
    try:
        pipe.send(work(group))
    except (PeerError, AssertionError) as error:
        pipe.send(error)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Ranks:
    """The processes of a group, seen from the test."""

    def __init__(self, size: int, work: Work, timeout_s: float, is_crowded: bool) -> None:
        self.segment = Segment.create(SegmentLayout(size).num_bytes)
        pipes = [CONTEXT.Pipe() for _ in range(size)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = []
        for rank, (_, theirs) in enumerate(pipes):
            arguments = (rank, size, self.segment.path, timeout_s, is_crowded, work, theirs)
            self.processes.append(CONTEXT.Process(target=be_rank, args=arguments))
            self.processes[-1].start()
            theirs.close()
        self.pids = [pipe.recv() for pipe in self.pipes]
        self.segment.forget_path()
        for pipe in self.pipes:
            pipe.send(self.pids)

    def result(self, rank: int, timeout_s: float = 60) -> Any:
        assert self.pipes[rank].poll(timeout_s), f"rank {rank} said nothing"
        result = self.pipes[rank].recv()
        if isinstance(result, AssertionError):
            raise result
        return result

    def results(self) -> list[Any]:
        return [self.result(rank) for rank in range(len(self.pipes))]

    def end(self) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.kill()
            process.join()
            process.close()
            pipe.close()


@contextmanager
def ranks(
    size: int, work: Work, timeout_s: float = 60, is_crowded: bool = False
) -> Iterator[Ranks]:
    before = set(os.listdir("/dev/shm"))
    started = Ranks(size, work, timeout_s, is_crowded)
    try:
        yield started
    finally:
        started.end()
    assert set(os.listdir("/dev/shm")) <= before


def values(rank: int, length: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """What a rank brings to a collective; every process can compute what all bring."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(length, generator=generator).to(dtype)
    return torch.randint(-(2**20), 2**20, (length,), generator=generator, dtype=dtype)


def expected_reduction(size: int, length: int, dtype: torch.dtype, op: str, seed: int = 0):
    parts = [values(rank, length, dtype, seed) for rank in range(size)]
    reduce_into(total := torch.empty(length, dtype=dtype), parts, op)
    return total


SLOT = SegmentLayout(2).slot_bytes
LENGTHS = [0, 1, 7, 1000, ONE_SHOT_BYTES // 4, ONE_SHOT_BYTES // 4 + 1, SLOT // 4 + 3, SLOT]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64]


def reduce_everything(group: Group) -> None:
    for length in LENGTHS:
        for dtype in DTYPES:
            for op in ("sum", "max"):
                mine = values(group.rank, length, dtype)
                expected = expected_reduction(group.size, length, dtype, op)
                assert torch.equal(group.all_reduce(mine, op), expected), (length, dtype, op)


@pytest.mark.parametrize("size", [2, 3])
def test_reductions_are_the_bits_of_one_process(size):
    with ranks(size, reduce_everything) as started:
        assert started.results() == [None] * size


def move_everything(group: Group) -> None:
    for length in LENGTHS:
        whole = [values(rank, length, torch.float32) for rank in range(group.size)]
        mine = whole[group.rank]
        assert all(map(torch.equal, group.all_gather(mine), whole))
        gathered = group.gather(mine)
        assert (gathered is not None) == (group.rank == 0)
        assert gathered is None or all(map(torch.equal, gathered, whole))
        for source in range(group.size):
            assert torch.equal(group.broadcast(mine.clone(), source), whole[source])
    square = values(group.rank, 36, torch.float32).view(6, 6)
    parts = [values(rank, 36, torch.float32).view(6, 6).T for rank in range(group.size)]
    assert all(map(torch.equal, group.all_gather(square.T), parts))
    reduce_into(total := torch.empty(6, 6), parts, "sum")
    assert torch.equal(group.all_reduce(square.T), total)
    scattered = group.reduce_scatter(torch.arange(3.0 * group.size))
    assert torch.equal(scattered, group.size * torch.arange(3.0) + 3 * group.size * group.rank)
    assert group.all_reduce(torch.tensor(2.0)).item() == 2 * group.size
    group.barrier()


def pass_on(group: Group) -> None:
    """Each sends to the next, pieces larger than a mailbox among them."""
    for length in (1, 100_000):
        after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        if group.rank == 0:
            group.send(values(0, length, torch.int64), after)
        found = group.recv(torch.empty(length, dtype=torch.int64), before)
        assert torch.equal(found, values(before, length, torch.int64))
        if group.rank != 0:
            group.send(values(group.rank, length, torch.int64), after)


def move_and_pass_on(group: Group) -> None:
    move_everything(group)
    pass_on(group)


def test_moves_bring_every_byte_to_its_place():
    with ranks(3, move_and_pass_on) as started:
        assert started.results() == [None] * 3


def mix(group: Group) -> str:
    """A thousand and more collectives in a random order, of random sizes; returns their sums."""
    choice, digest = random.Random(7), torch.zeros((), dtype=torch.float64)
    for turn in range(1200):
        length = choice.choice([1, 5, 300, 4096, 4096, 20_000, 200_000 if turn % 50 == 0 else 8])
        mine = values(group.rank, length, torch.float32, turn)
        kind, source = choice.choice(["reduce", "reduce", "gather", "broadcast", "all"]), turn % 2
        if kind == "reduce":
            digest += group.all_reduce(mine).double().sum()
        elif kind == "broadcast":
            digest += group.broadcast(mine, source).double().sum()
        elif kind == "all":
            digest += torch.stack(group.all_gather(mine)).double().sum()
        elif (parts := group.gather(mine)) is not None:
            expected = [values(rank, length, torch.float32, turn) for rank in range(group.size)]
            assert all(map(torch.equal, parts, expected))
    return digest.item().hex()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_thousand_mixed_collectives_agree_on_all_ranks_and_from_run_to_run(size):
    """Eight ranks are more than most testers' cores."""
    with ranks(size, mix, is_crowded=size == 8) as started:
        first = started.results()
    assert len(set(first)) == 1
