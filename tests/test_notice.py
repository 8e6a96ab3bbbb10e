"""No wait for other ranks is silent: who is missing, until when, and who of those that wait says so."""

from __future__ import annotations

import io
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from launcher.environment.worker import WorkerEnvironment
from launcher.failures import RunError
from launcher.ranks import notice as notice_module
from launcher.ranks.arrival import wait_for
from launcher.ranks.collectives import open_group
from launcher.ranks.deadline import Deadline, arrival_deadline
from launcher.ranks.member import Member
from launcher.ranks.notice import Notice
from launcher.ranks.place import place_of_process
from launcher.ranks.presence import Presence, write_end
from launcher.ranks.rendezvous import join
from launcher.ranks.scheduler import host_until_done
from launcher.ranks.watch import Watch
from launcher.schema import ParallelSection
from tests.test_rendezvous import free_port, in_background, join_all, wait_until, worker

END = r"until \d\d:\d\d:\d\d \(parallel\.{key}={seconds}\)"
ARRIVAL = END.format(key="start_timeout_s", seconds=60)
COLLECTIVE = END.format(key="timeout_s", seconds=60)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test itself must not wait for seconds."""
    monkeypatch.setattr(notice_module, "FIRST_S", 0.1)
    monkeypatch.setattr(notice_module, "EVERY_S", 0.1)


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def pair(store: dist.TCPStore) -> list[Member]:
    return join_all([worker(store, 2, rank) for rank in (0, 1)])


class Console(io.StringIO):
    def wait_for(self, line: str) -> None:
        """Until it is said; what the waits before it say may come first."""
        wait_until(lambda: any(re.fullmatch(line, each) for each in self.lines()), timeout_s=30)

    def lines(self) -> list[str]:
        return self.getvalue().splitlines()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(notice_module.time, "monotonic", lambda: clock.now)
    return clock


def test_wait_is_said_after_5_seconds_and_then_every_30(monkeypatch, clock):
    monkeypatch.undo()
    assert (notice_module.FIRST_S, notice_module.EVERY_S) == (5.0, 30.0)
    monkeypatch.setattr(notice_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    console = Console()
    notice = Notice(console, "rank 0", Deadline(300, "parallel.start_timeout_s"))
    notice.whom = "rank 1 of 2 to arrive"
    said_at = []
    for second in range(70):
        clock.now = 100.0 + second
        before = len(console.lines())
        notice.look()
        said_at += [second] * (len(console.lines()) - before)
    assert said_at == [5, 35, 65]


def test_nothing_is_said_while_nobody_is_missing():
    console = Console()
    notice = Notice(console, "rank 0", None)
    wait_until(lambda: notice.is_due)
    notice.look()
    assert console.lines() == []


def test_end_of_a_wait_has_its_date_where_it_is_not_today():
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(x=2e\+06\)", Deadline(2e6, "x").end)


def test_rule_is_that_of_whoever_sets_the_earlier_deadline():
    environment = WorkerEnvironment(start_timeout_s=10)
    assert arrival_deadline(environment, 300).end.endswith("(MS_TOPO_TIMEOUT=10)")
    assert arrival_deadline(environment, 5).end.endswith("(parallel.start_timeout_s=5)")


def test_missing_ranks_are_said_by_one_of_those_that_wait(store):
    consoles = [Console(), Console()]
    waiting = [
        in_background(join, worker(store, 4, rank), 60, console)
        for rank, console in zip((0, 2), consoles, strict=True)
    ]
    wait_until(lambda: sum(len(console.lines()) for console in consoles) >= 3)
    join_all([worker(store, 4, rank) for rank in (1, 3)])
    for future in waiting:
        future.result(10)
    (spoken,) = [console for console in consoles if console.lines()]
    spoken.wait_for(rf"shardrun: rank [02] waits for rank 1, 3 of 4 to arrive, {ARRIVAL}")


def test_missing_workers_are_counted_where_ranks_are_handed_out(store):
    console = Console()
    waiting = in_background(join, worker(store, 3), 60, console)
    console.wait_for(rf"shardrun: a worker waits for 2 of 3 workers to arrive, {ARRIVAL}")
    join_all([worker(store, 3)] * 2)
    waiting.result(10)


def test_scheduler_says_who_is_missing_besides_the_worker_that_waits(capfd):
    scheduler = WorkerEnvironment(
        launcher="mindspore", size=2, is_scheduler=True, store=f"127.0.0.1:{free_port()}"
    )
    hosting = in_background(host_until_done, scheduler, 2)
    first = replace(scheduler, is_scheduler=False, rank=0)
    console = Console()
    waiting = in_background(join, first, 60, console)
    console.wait_for(rf"shardrun: rank 0 waits for rank 1 of 2 to arrive, {ARRIVAL}")
    for process in (hosting, waiting):
        with pytest.raises(RunError):
            process.result(20)
    end = END.format(key="start_timeout_s", seconds=2)
    said = capfd.readouterr().err
    assert re.search(rf"shardrun: the scheduler waits for rank 1 of 2 to arrive, {end}", said)


def test_each_worker_says_that_the_scheduler_is_missing():
    """Each may have a terminal of its own, and none can know of the others."""
    port = free_port()
    consoles = [Console(), Console()]
    waiting = [
        in_background(
            join,
            WorkerEnvironment(launcher="mindspore", size=2, rank=rank, store=f"127.0.0.1:{port}"),
            60,
            console,
        )
        for rank, console in enumerate(consoles)
    ]
    for rank, console in enumerate(consoles):
        console.wait_for(
            rf"shardrun: rank {rank} waits for the scheduler to open the rendezvous "
            rf"\(127.0.0.1:{port}\), {ARRIVAL}"
        )
    host = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for future in waiting:
        future.result(10)
    del host


def test_one_rank_of_a_launcher_says_that_rank_0_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environments = [
        WorkerEnvironment(launcher="slurm", size=3, rank=rank, job="j") for rank in (0, 1, 2)
    ]
    consoles = [Console(), Console()]
    waiting = [
        in_background(join, environment, 60, console)
        for environment, console in zip(environments[1:], consoles, strict=True)
    ]
    consoles[0].wait_for(
        rf"shardrun: rank 1 waits for rank 0 to open the rendezvous \(.*\), {ARRIVAL}"
    )
    host = join(environments[0], 60)
    for future in waiting:
        future.result(10)
    assert not any("rank 0" in line for line in consoles[1].lines())
    del host


@pytest.fixture
def mute_host() -> Iterator[int]:
    """The port of a process that is stopped: the kernel takes connections, and nobody answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def test_call_that_blocks_is_no_silent_wait(mute_host):
    console = Console()
    environment = WorkerEnvironment(
        launcher="mindspore", size=2, rank=0, store=f"127.0.0.1:{mute_host}"
    )

    def arrive() -> None:
        with pytest.raises(RunError):
            join(environment, 60, console)

    waiting = threading.Thread(target=arrive, daemon=True)
    waiting.start()
    wait_until(lambda: len(console.lines()) >= 2)
    assert "rank 0 waits for the scheduler to open the rendezvous" in console.lines()[-1]


def test_rank_that_has_not_read_its_job_is_said(store):
    console = Console()
    deadline = Deadline(60, "parallel.start_timeout_s")

    def read() -> list[bytes]:
        with Notice(console, "rank 1", deadline).given() as notice:
            return wait_for(store, "job", 4, deadline, notice, "read its job", ranks=[0])

    waiting = in_background(read)
    console.wait_for(rf"shardrun: rank 1 waits for rank 0 of 4 to read its job, {ARRIVAL}")
    store.set("job/0", "published")
    assert waiting.result(10) == [b"published"]


@pytest.mark.parametrize("collectives", ["auto", "gloo"])
def test_rank_that_does_not_connect_is_said(pair, collectives):
    console = Console()
    member = replace(pair[0], console=console)
    section = ParallelSection(timeout_s=1, collectives=collectives)
    watches = [Watch(each, print) for each in pair]
    for watch in watches:
        watch.start()
    with pytest.raises(RunError, match="connecting the ranks broke"):
        open_group(member, torch.device("cpu"), section, watches[0])
    for watch in watches:
        watch.stop()
    end = END.format(key="timeout_s", seconds=1)
    console.wait_for(rf"shardrun: rank 0 waits for rank 1 of 2 to connect, {end}")


def test_rank_that_is_behind_is_said_by_the_lowest_that_waits(store):
    members = join_all([worker(store, 4, rank) for rank in range(4)])
    consoles = [Console() for _ in members]
    watches = [
        Watch(replace(member, console=console), print)
        for member, console in zip(members, consoles, strict=True)
    ]
    for watch, count in zip(watches, (5, 7, 5, 7), strict=True):
        watch.follow(lambda count=count: count, 60)
    watches[2].say_doing("loading weights")
    for watch in watches:
        watch.start()
    wait_until(lambda: any("loading" in line for line in consoles[1].lines()))
    for watch in watches:
        watch.stop()
    line = rf"shardrun: rank 1 waits for rank 0, 2 of 4 \(loading weights\), {COLLECTIVE}"
    assert re.fullmatch(line, consoles[1].lines()[-1])
    assert [bool(console.lines()) for console in consoles] == [False, True, False, False]


def test_nobody_waits_in_a_collective_for_a_rank_that_has_ended(pair):
    console = Console()
    write_end(pair[1].store, 1, 0, "", is_cause=False)
    watch = Watch(replace(pair[0], console=console), print)
    counts = []
    watch.follow(lambda: counts.append(7) or 7, 60)
    watch.start()
    wait_until(lambda: len(counts) >= 4)
    watch.stop()
    assert console.lines() == []


def test_rank_that_is_done_says_for_whose_end_it_stays(store):
    console = Console()
    write_end(store, 0, 0, "", is_cause=False)
    presence = Presence(store, [place_of_process()] * 2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(presence.wait_for_ends, Notice(console, "rank 0", None))
        console.wait_for(
            r"shardrun: rank 0 waits for rank 1 \(.*\) to end, for as long as it lives"
        )
        write_end(store, 1, 0, "", is_cause=False)
        assert len(waiting.result(10)) == 2
