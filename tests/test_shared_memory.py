"""Groups of processes on one host: real processes against the sums of one."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.failures import ConfigError
from launcher.ranks.collectives import open_group
from launcher.ranks.member import Member
from launcher.ranks.place import is_stopped, process_start
from launcher.ranks.watch import Watch
from launcher.schema import ParallelSection
from parallel.collectives.network import TorchGroup
from parallel.collectives.segment import Segment, SegmentError
from parallel.collectives.shared_memory import ONE_SHOT_BYTES, SegmentLayout, SharedMemoryGroup
from parallel.collectives.two_level import TwoLevelGroup
from parallel.errors import PeerError
from parallel.group import Group, reduce_into
from tests.test_rendezvous import join_all, worker

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.test_shared_memory"])
Work = Callable[[Group], Any]


def be_rank(
    rank: int,
    size: int,
    path: str,
    timeout_s: float,
    is_crowded: bool,
    work: Work,
    pipe: Connection,
) -> None:
    """A process of its own: one rank, whose result or error goes to the test."""
    torch.set_num_threads(1)
    segment = Segment.attach(path, SegmentLayout(size).num_bytes)
    pipe.send(os.getpid())
    pids = pipe.recv()
    group = SharedMemoryGroup(
        rank, size, segment, timeout_s, Processes(pids), is_crowded=is_crowded
    )
    try:
        pipe.send(work(group))
    except (PeerError, AssertionError) as error:
        pipe.send(error)


class Processes:
    """What the launcher knows of the ranks' processes, by pid alone."""

    def __init__(self, pids: list[int]) -> None:
        self.pids = pids

    def is_running(self, rank: int) -> bool:
        return process_start(self.pids[rank]) != 0

    def is_stopped(self, rank: int) -> bool:
        return is_stopped(self.pids[rank])


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
    started = Ranks(size, work, timeout_s, is_crowded)
    try:
        yield started
    finally:
        started.end()


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
# The last is a little more than a slot of float32, and three pieces of int64.
LENGTHS = [0, 1, 7, 1000, ONE_SHOT_BYTES // 4, ONE_SHOT_BYTES // 4 + 1, SLOT // 4 + 3]
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


def move_everything(group: Group, lengths: Sequence[int]) -> None:
    for length in lengths:
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
    torch.testing.assert_close(group.all_reduce(square.T), total)
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


def move_and_pass_on(group: Group, lengths: Sequence[int] = LENGTHS) -> None:
    move_everything(group, lengths)
    pass_on(group)


def test_moves_bring_every_byte_to_its_place():
    with ranks(3, move_and_pass_on) as started:
        assert started.results() == [None] * 3


def mix(group: Group) -> str:
    """A thousand collectives in a random order, of random sizes; returns their sums."""
    choice, digest = random.Random(7), torch.zeros((), dtype=torch.float64)
    for turn in range(1000):
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
    if size == 4:
        with ranks(size, mix, is_crowded=True) as started:
            assert started.results() == first


def add_for_ever(group: Group) -> None:
    while True:
        group.all_reduce(torch.ones(4096))


def test_killed_rank_is_named_within_seconds():
    with ranks(3, add_for_ever) as started:
        time.sleep(0.2)
        os.kill(started.pids[1], signal.SIGKILL)
        errors = [started.result(rank, timeout_s=10) for rank in (0, 2)]
    for error in errors:
        assert re.fullmatch(r"all_reduce number \d+ \(rank 1 is gone\)", str(error))


def test_frozen_rank_is_named_at_the_deadline():
    with ranks(3, add_for_ever, timeout_s=0.7) as started:
        time.sleep(0.2)
        os.kill(started.pids[2], signal.SIGSTOP)
        errors = [started.result(rank, timeout_s=10) for rank in (0, 1)]
    for error in errors:
        expected = r"all_reduce number \d+ \(rank 2 did not come within 0.7 s\)"
        assert re.fullmatch(expected, str(error))


def test_frozen_rank_is_named_long_before_a_long_deadline():
    with ranks(2, add_for_ever, timeout_s=300) as started:
        time.sleep(0.2)
        os.kill(started.pids[1], signal.SIGSTOP)
        error = started.result(0, timeout_s=10)
    assert re.fullmatch(r"all_reduce number \d+ \(rank 1 was stopped by a signal\)", str(error))


def test_ranks_that_were_all_suspended_blame_nobody():
    """Ctrl-Z, or a job that Slurm suspends: the clock runs on, but nobody is late."""
    with ranks(2, add_for_ever, timeout_s=0.7) as started:
        for sent in (signal.SIGSTOP, signal.SIGCONT):
            for pid in started.pids:
                os.kill(pid, sent)
            time.sleep(1.3)
        assert not any(pipe.poll(0) for pipe in started.pipes)


def test_segment_has_no_name_that_could_be_left(monkeypatch):
    monkeypatch.setattr(os, "memfd_create", refuse)
    without_memfd = Segment.create(1 << 16)
    monkeypatch.undo()
    for segment in (without_memfd, Segment.create(1 << 16)):
        assert os.stat(segment.path).st_nlink == 0
        other = Segment.attach(segment.path, 1 << 16)
        segment.memory[7] = 3
        assert other.memory[7] == 3
        other.forget_path()
        segment.forget_path()


def refuse(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_memory_that_is_missing_is_a_sentence_and_no_signal(monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SegmentError, match=r"cannot be shared \(memfd: No space left"):
        Segment.create(1 << 16)


def test_segment_of_another_size_is_refused():
    segment = Segment.create(1 << 16)
    with pytest.raises(SegmentError, match="not of 4096 bytes"):
        Segment.attach(segment.path, 4096)
    segment.forget_path()
    with pytest.raises(SegmentError, match="cannot be opened"):
        Segment.attach(segment.path, 1 << 16)


HOSTS = (0, 0, 1, 0, 1)


def be_rank_of_hosts(rank: int, port: int, paths: list[str], pipe: Connection) -> None:
    """A process of its own: one rank of a job on two hosts, which are labels."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(HOSTS))
    members = dist.new_group([0, 2])
    here = [other for other, host in enumerate(HOSTS) if host == HOSTS[rank]]
    segment = Segment.attach(paths[HOSTS[rank]], SegmentLayout(len(here)).num_bytes)
    inside = SharedMemoryGroup(
        here.index(rank), len(here), segment, 60, Processes([os.getpid()] * 4)
    )
    between = TorchGroup(members=members) if rank in (0, 2) else None
    group = TwoLevelGroup(HOSTS, inside, between, TorchGroup())
    try:
        move_and_pass_on(group, LENGTHS[:5])
        sums = [group.all_reduce(values(rank, 5000, dtype)) for dtype in DTYPES]
        lost = torch.tensor([torch.nan if rank == 2 else 1.0])
        assert group.all_reduce(lost, "max").isnan().all(), "a NaN of one rank was lost"
        pipe.send([total.double().tolist() for total in sums])  # a tensor would need its sender
    except AssertionError as error:
        pipe.send(error)
    dist.destroy_process_group()


def test_two_levels_equal_one():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    segments = [Segment.create(SegmentLayout(HOSTS.count(host)).num_bytes) for host in (0, 1)]
    paths = [segment.path for segment in segments]
    pipes = [CONTEXT.Pipe() for _ in HOSTS]
    processes = [
        CONTEXT.Process(target=be_rank_of_hosts, args=(rank, store.port, paths, theirs))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    results = [pipe.recv() if pipe.poll(60) else None for pipe, _ in pipes]
    for process in processes:
        process.join()
    for sums in results:
        assert isinstance(sums, list), sums
        assert sums == results[0]
        for dtype, total in zip(DTYPES, sums, strict=True):
            expected = expected_reduction(len(HOSTS), 5000, dtype, "sum").double()
            # Floats are added in another order: first inside the hosts, then between them.
            rtol = 2e-2 if dtype.itemsize == 2 else 1e-4
            torch.testing.assert_close(torch.tensor(total).double(), expected, rtol=rtol, atol=1e-5)


def opened(
    section: ParallelSection, machines: Sequence[str] | None = None
) -> list[Group | Exception]:
    """What `open_group` gives two ranks that are threads of this process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    members = join_all([worker(store, 2, rank) for rank in (0, 1)])
    for member in members if machines else ():
        for place, machine in zip(member.places, machines or (), strict=True):
            place["machine"] = machine

    def attempt(member: Member) -> Group | Exception:
        try:
            return open_group(member, torch.device("cpu"), section, Watch(member, print))
        except (ConfigError, PeerError) as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(attempt, members))


def test_ranks_of_one_host_share_memory_without_a_network():
    first, second = opened(ParallelSection())
    with ThreadPoolExecutor(1) as pool:
        total = pool.submit(first.all_reduce, torch.ones(3))
        assert second.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
        assert total.result().tolist() == [2.0] * 3
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("machines", "is_ordered", "reason"),
    [
        (("n1", "n2"), True, "the ranks are on 2 hosts; write auto or gloo."),
        (None, False, "the stores of this processor"),
    ],
)
def test_shared_memory_that_cannot_be_is_refused(monkeypatch, machines, is_ordered, reason):
    monkeypatch.setattr("launcher.ranks.collectives.is_ordered_processor", lambda: is_ordered)
    for error in opened(ParallelSection(collectives="shared_memory"), machines):
        assert isinstance(error, ConfigError)
        assert reason in str(error)


def test_memory_that_one_rank_cannot_have_is_known_to_all(monkeypatch):
    monkeypatch.setattr(Segment, "attach", lambda path, num_bytes: refuse_segment())
    for error in opened(ParallelSection(collectives="shared_memory")):
        assert str(error) == "`parallel.collectives` is shared_memory, but rank 1: no memory."


def refuse_segment() -> Segment:
    raise SegmentError("no memory")


def test_gloo_is_for_cpus_only():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    member = join_all([worker(store, 2, rank) for rank in (0, 1)])[0]
    section = ParallelSection(collectives="gloo")
    with pytest.raises(ConfigError, match="GPUs exchange over NCCL"):
        open_group(member, torch.device("cuda"), section, Watch(member, print))


def add_with_and_without_compiled(group: SharedMemoryGroup) -> list[list[float]]:
    """Rank 1 takes its turns in Python whatever there is; the others in C where it was compiled."""
    if group.rank == 1:
        group._compiled = None
    found = []
    for turn in range(20):
        for dtype, op in ((torch.float32, "sum"), (torch.float32, "max"), (torch.int64, "sum")):
            x = torch.arange(turn * 7).mul(group.rank + 1).sub(turn).to(dtype)
            found.append(group.all_reduce(x, op).tolist())
    return found


def test_compiled_turns_and_those_in_python_are_the_same_turns():
    with ranks(3, add_with_and_without_compiled) as started:
        results = started.results()
    place = iter(results[0])
    for turn in range(20):
        x = torch.arange(turn * 7)
        parts = [x.mul(rank + 1).sub(turn) for rank in range(3)]
        for wanted in (sum(parts), torch.stack(parts).amax(0) if turn else x, sum(parts)):
            assert next(place) == wanted.tolist()
    assert results[1] == results[0] == results[2]
