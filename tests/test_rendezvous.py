"""How ranks meet: over a real store on loopback, with threads or processes as the ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launcher.environment.worker import WorkerEnvironment
from launcher.failures import RunError
from launcher.ranks.member import Member
from launcher.ranks.place import is_running, place_of_process
from launcher.ranks.presence import Presence, write_beat, write_end
from launcher.ranks.rendezvous import join, say_ended
from launcher.ranks.scheduler import host_until_done
from launcher.ranks.watch import BEAT_S, StuckRankError, Watch

# A rank as a process of its own: joins from its MS_* variables, says its rank, waits to be ended.
RANK_PROGRAM = """
import os, sys, time
from launcher.environment.detection import detect
from launcher.ranks.rendezvous import join, say_ended
member = join(detect(os.environ), 20)
print(member.rank, flush=True)
sys.stdin.readline()
say_ended(member, 0, "", is_cause=False)
"""


@pytest.fixture
def store() -> dist.TCPStore:
    """A store that a scheduler would host."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def worker(store: dist.TCPStore, size: int, rank: int | None = None) -> WorkerEnvironment:
    return WorkerEnvironment(
        launcher="mindspore", size=size, rank=rank, store=f"127.0.0.1:{store.port}"
    )


def join_all(environments: list[WorkerEnvironment], timeout_s: float = 10) -> list[Any]:
    """Every worker joins in a thread of its own: the members, and the errors of those refused."""

    def attempt(environment: WorkerEnvironment) -> Member | RunError:
        try:
            return join(environment, timeout_s)
        except RunError as error:
            return error

    with ThreadPoolExecutor(len(environments)) as pool:
        return list(pool.map(attempt, environments))


def in_background(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function, *arguments)
    pool.shutdown(wait=False)
    return future


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_ranks_from_the_launcher_are_kept(store: dist.TCPStore) -> None:
    members = join_all([worker(store, 3, rank) for rank in (2, 0, 1)])
    assert [member.rank for member in members] == [2, 0, 1]
    assert all(member.size == 3 and member.is_one_host for member in members)
    assert all(member.ranks_here == [0, 1, 2] for member in members)


def test_ranks_are_handed_out_where_the_launcher_gave_none(store: dist.TCPStore) -> None:
    members = join_all([worker(store, 4)] * 4)
    assert sorted(member.rank for member in members) == [0, 1, 2, 3]
    assert sorted(member.local_rank for member in members) == [0, 1, 2, 3]


def test_free_ranks_go_to_those_without_one(store: dist.TCPStore) -> None:
    members = join_all([worker(store, 4, rank) for rank in (None, 0, None, 2)])
    assert [members[1].rank, members[3].rank] == [0, 2]
    assert {members[0].rank, members[2].rank} == {1, 3}


def test_two_claims_of_one_rank_are_refused_at_once(store: dist.TCPStore) -> None:
    started_at = time.monotonic()
    results = join_all([worker(store, 2, 1), worker(store, 2, 1)], timeout_s=30)
    assert time.monotonic() - started_at < 5
    assert [str(result) for result in results] == [
        "two workers claim rank 1; give each its own RANK_ID"
    ] * 2


def test_missing_ranks_are_named_at_the_deadline(store: dist.TCPStore) -> None:
    results = join_all([worker(store, 4, 0), worker(store, 4, 2)], timeout_s=0.3)
    for result in results:
        assert "rank 1, 3 of 4 did not arrive within 0.3 s" in str(result)


def test_missing_workers_are_counted_where_ranks_are_handed_out(store: dist.TCPStore) -> None:
    results = join_all([worker(store, 3), worker(store, 3, 2)], timeout_s=0.3)
    assert "only 2 of 3 workers arrived within 0.3 s" in str(results[0])
    assert "(rank 2, and 1 without a RANK_ID)" in str(results[0])


def test_one_worker_too_many_is_refused_and_the_others_go_on(store: dist.TCPStore) -> None:
    results = join_all([worker(store, 2)] * 3)
    refused = [result for result in results if isinstance(result, RunError)]
    assert [str(error) for error in refused] == [
        "3 workers arrived, but the job has 2: one is too many"
    ]


def test_the_launchers_deadline_wins_where_it_is_earlier(store: dist.TCPStore) -> None:
    environment = replace(worker(store, 2, 0), start_timeout_s=0.2)
    started_at = time.monotonic()
    with pytest.raises(RunError, match=r"rank 1 of 2 did not arrive within 0.2 s"):
        join(environment, 60)
    assert time.monotonic() - started_at < 5


def test_a_store_that_nobody_hosts_is_a_sentence() -> None:
    port = free_port()
    environment = WorkerEnvironment(launcher="mindspore", size=2, rank=0, store=f"127.0.0.1:{port}")
    with pytest.raises(RunError, match=rf"reach the rendezvous at 127.0.0.1:{port} within 0.2 s"):
        join(environment, 0.2)


def test_a_store_whose_name_is_unknown_is_a_sentence() -> None:
    environment = WorkerEnvironment(
        launcher="torchrun", size=2, rank=1, store="no-such-host.invalid:29500"
    )
    with pytest.raises(RunError, match=r"reach the rendezvous at no-such-host.invalid:29500"):
        join(environment, 0.2)


def test_a_taken_port_is_a_sentence(store: dist.TCPStore) -> None:
    environment = replace(worker(store, 2), is_scheduler=True)
    with pytest.raises(RunError, match=rf"could not open the rendezvous at 127.0.0.1:{store.port}"):
        host_until_done(environment, 1)


def test_a_store_whose_host_is_gone_is_a_sentence() -> None:
    host = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, torch.distributed as dist\n"
            "store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
            "print(store.port, flush=True)\n"
            "sys.stdin.readline()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with host:
        assert host.stdout is not None
        environment = WorkerEnvironment(
            launcher="mindspore", size=2, rank=0, store=f"127.0.0.1:{int(host.stdout.readline())}"
        )
        joining = in_background(join, environment, 30)
        time.sleep(0.3)
        host.kill()
        with pytest.raises(RunError, match="the rendezvous is gone: the scheduler, which hosts it"):
            joining.result(timeout=10)


def test_two_jobs_on_one_store_do_not_meet(store: dist.TCPStore) -> None:
    jobs = [replace(worker(store, 2, rank), job=job) for job in "ab" for rank in (0, 1)]
    assert [member.rank for member in join_all(jobs)] == [0, 1, 0, 1]


@pytest.fixture
def own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def local(rank: int, size: int = 2, job: str = "slurm-7-0") -> WorkerEnvironment:
    """A rank of srun or mpirun on one host: rank 0 opens the store."""
    return WorkerEnvironment(launcher="slurm", size=size, rank=rank, job=job)


def test_rank_0_opens_a_store_where_the_launcher_names_none(own_tmp: Path) -> None:
    members = join_all([local(1), local(2, 3), local(0, 3), local(1, 3)][1:])
    assert [member.rank for member in members] == [2, 0, 1]
    assert [member.hosts_store for member in members] == [False, True, False]
    assert list(own_tmp.iterdir()) == []


def test_a_stale_port_file_is_ignored(own_tmp: Path) -> None:
    stale = {**place_of_process(), "port": free_port(), "started": 1}
    (own_tmp / f"shardrun-{os.getuid()}-slurm-7-0.json").write_text(json.dumps(stale))
    late = in_background(join, local(1), 10)
    time.sleep(0.2)
    host = join(local(0), 10)  # kept: the store goes when its member does
    assert late.result(timeout=10).rank == 1
    assert host.rank == 0


def test_rank_0_that_never_starts_is_named(own_tmp: Path) -> None:
    with pytest.raises(RunError, match=r"rank 0 did not arrive within 0.2 s"):
        join(local(1), 0.2)


def test_the_rank_that_hosts_the_store_waits_for_the_others(own_tmp: Path) -> None:
    host, other = join_all([local(0), local(1)])
    leaving = in_background(lambda: say_ended(host, 0, "", is_cause=False))
    time.sleep(0.2)
    assert not leaving.done()
    say_ended(other, 0, "", is_cause=False)
    leaving.result(timeout=5)


def test_the_scheduler_stays_until_every_worker_has_ended() -> None:
    port = free_port()
    scheduler = WorkerEnvironment(
        launcher="mindspore", size=2, is_scheduler=True, store=f"127.0.0.1:{port}"
    )
    hosting = in_background(host_until_done, scheduler, 10)
    members = join_all([replace(scheduler, is_scheduler=False, rank=rank) for rank in (0, 1)])
    say_ended(members[0], 0, "", is_cause=False)
    time.sleep(0.2)
    assert not hosting.done()
    say_ended(members[1], 1, "ValueError: x", is_cause=True)
    assert hosting.result(timeout=5) == 1


def start_process(port: int, **variables: str) -> subprocess.Popen[str]:
    environ = {**os.environ, "MS_WORKER_NUM": "2", "MS_SCHED_HOST": "127.0.0.1"}
    environ |= {"MS_SCHED_PORT": str(port), "MS_ROLE": "MS_WORKER", **variables}
    return subprocess.Popen(
        [sys.executable, "-c", RANK_PROGRAM],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_process_is_named_by_scheduler_and_watch(
    capfd: pytest.CaptureFixture[str],
) -> None:
    port = free_port()
    scheduler = WorkerEnvironment(
        launcher="mindspore", size=2, is_scheduler=True, store=f"127.0.0.1:{port}"
    )
    hosting = in_background(host_until_done, scheduler, 20)
    with start_process(port) as victim:
        member = join(replace(scheduler, is_scheduler=False), 20)
        assert victim.stdout is not None
        rank = int(victim.stdout.readline())
        assert {rank, member.rank} == {0, 1}
        heard: list[str] = []
        watch = Watch(member, heard.append)
        watch.start()
        victim.kill()
        broken = watch.describe_failure("all_reduce number 1")
        wait_until(lambda: bool(heard))
        watch.stop()
    name = f"rank {rank} (host {socket.gethostname()}, pid {victim.pid})"
    assert broken == f"all_reduce number 1 broke: {name} ended without a word"
    assert heard == [f"{name} ended without a word"]
    say_ended(member, 1, broken, is_cause=False)
    assert hosting.result(timeout=5) == 1
    assert f"shardrun: {name} ended without a word (said the scheduler)" in capfd.readouterr().err


def wait_until(is_so: Callable[[], bool], timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def pair(store: dist.TCPStore) -> list[Member]:
    """Two ranks of one host, which are threads of this process."""
    return join_all([worker(store, 2, 0), worker(store, 2, 1)])


def test_a_watch_prefers_the_rank_where_it_began(store: dist.TCPStore) -> None:
    members = join_all([worker(store, 4, rank) for rank in range(4)])
    write_end(members[1].store, 1, 1, "all_reduce broke: rank 2 …", is_cause=False)
    write_end(members[2].store, 2, 1, "ValueError: bad", is_cause=True)
    watch = Watch(members[0], print)
    assert watch.describe_failure("x") == "x broke: rank 2 failed: ValueError: bad"


def test_a_consequence_is_passed_on_with_who_said_it(pair: list[Member]) -> None:
    write_end(pair[1].store, 1, 1, "all_reduce broke: rank 7 is gone", is_cause=False)
    message = Watch(pair[0], print).describe_failure("x")
    assert message == "x broke: all_reduce broke: rank 7 is gone (said rank 1)"


def test_a_rank_that_ended_well_is_not_lost(pair: list[Member]) -> None:
    write_end(pair[1].store, 1, 0, "", is_cause=False)
    heard: list[str] = []
    watch = Watch(pair[0], heard.append)
    watch.start()
    time.sleep(2 * BEAT_S)
    watch.stop()
    assert heard == []


def test_a_rank_that_is_behind_is_named_at_the_deadline(pair: list[Member]) -> None:
    watches = [Watch(member, print) for member in pair]
    for watch, count in zip(watches, (7, 5), strict=True):
        watch.follow(lambda count=count: count, 300)
        watch.start()
    time.sleep(2 * BEAT_S)
    with pytest.raises(StuckRankError) as caught:
        watches[0].describe_failure("all_reduce number 7")
    for watch in watches:
        watch.stop()
    assert caught.value.rank == 1
    assert str(caught.value).startswith(f"rank 1 (host {socket.gethostname()}, pid {os.getpid()})")
    assert "it entered only 5 collectives" in str(caught.value)


def test_a_rank_elsewhere_is_alive_while_it_beats(store: dist.TCPStore) -> None:
    elsewhere = {**place_of_process(), "machine": "another", "pid": 2**22 + 1}
    presence = Presence(store, [elsewhere])
    presence._looked_at -= 100.0  # as if this process had been stopped: nobody is blamed for it
    assert presence.is_alive(0)
    write_beat(store, 0, 1)
    assert presence.is_alive(0)
    presence._beats[0] = (store.get("beat/0"), time.monotonic() - 7.0)
    assert not presence.is_alive(0)
    write_beat(store, 0, 2)
    assert presence.is_alive(0)


def test_a_pid_that_is_used_again_is_another_process() -> None:
    place = place_of_process()
    assert is_running(place)
    assert not is_running({**place, "started": place["started"] - 1})


def test_the_host_gives_a_silent_rank_some_seconds_only(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.ranks.presence.GRACE_S", 0.2)
    store.set_timeout(timedelta(seconds=5))
    write_end(store, 0, 1, "ValueError: x", is_cause=True)
    presence = Presence(store, [place_of_process()] * 2)
    waiting = threading.Thread(target=presence.wait_for_ends)
    waiting.start()
    waiting.join(timeout=3)
    assert not waiting.is_alive()
