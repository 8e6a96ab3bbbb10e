"""The life of one rank: arrive, meet the others, do the task's part, say goodbye.

`run_started` is for ranks that we start (launcher/workers.py), `run_external` for ranks that
torchrun, MindSpore, Slurm or MPI start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from launcher.device import resolve_device, share_cores
from launcher.environment import WorkerEnvironment, detect
from launcher.failures import (
    EXIT_FAILED,
    EXIT_USER,
    USER_ERRORS,
    ConfigError,
    ErrorRecord,
)
from launcher.job import Job, first_difference
from launcher.rank import Rank
from launcher.rendezvous import Member, join, say_ended
from launcher.run_dir import RunDir
from launcher.tasks import rank_task
from launcher.watch import Watch, end_process
from parallel.errors import PeerError
from parallel.group import Group, LoneGroup, TorchGroup


def run_started(run_path: str, job_hash: str, started_at: float) -> None:
    """Entry point of a rank that we started: its output goes to its log, its error to a record."""
    run_dir = RunDir(Path(run_path))
    console = _redirect_output(run_dir.log(int(os.environ["RANK"])))
    member = join(detect(os.environ), timeout_s=60)

    def record(error: BaseException) -> int:
        found = ErrorRecord.of(member.rank, error)
        print(found.traceback, file=sys.stderr)
        found.write(run_dir.error(member.rank))
        return EXIT_FAILED

    def work() -> None:
        _do_task(member, run_dir.read_job(job_hash), run_dir, console, started_at)

    status = _live(member, work, record)
    if status:
        _leave(status)


def run_external(
    environment: WorkerEnvironment, make_job: Callable[[], Job], started_at: float
) -> int:
    """Entry point of a rank that somebody else started: its output is theirs to collect.

    Args:
        make_job: composes and checks the job from this process's own command line.

    Returns:
        0; a failed rank leaves the process with its status.
    """
    member = join(environment, environment.start_timeout_s or 300.0)

    def work() -> None:
        job, run_dir = _agree(member, make_job)
        _do_task(member, job, run_dir, sys.stderr, started_at)

    status = _live(member, work, lambda error: _report(member, error))
    if status:
        _leave(status)
    return status


def _live(
    member: Member, work: Callable[[], None], record: Callable[[BaseException], int]
) -> int:
    """Work, and tell the others how it ended: what failed first must be known before we leave."""
    status, cause = 0, ""
    try:
        work()
    except BaseException as error:
        status = record(error)
        # Who failed because of another has nothing to tell: the other one is the cause.
        cause = "" if isinstance(error, PeerError) else f"{type(error).__name__}: {error}"
    say_ended(member, status, cause)
    return status


def _leave(status: int) -> None:
    """End at once: a broken process group can block an ordinary exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _do_task(
    member: Member, job: Job, run_dir: RunDir, console: TextIO, started_at: float
) -> None:
    share_cores(_num_local_ranks(member))
    device = resolve_device(job.config.device, member.local_rank)
    groups: list[Group] = []
    watch = Watch(member, lambda: sum(groups[0].counts.values()) if groups else 0, end_process)
    watch.start()
    try:
        groups.append(_open_group(member, device, job.config.parallel.timeout_s, watch))
        rank = Rank(job, groups[0], device, run_dir, console, started_at)
        rank_task(job.config.task.name)(rank)
    finally:
        watch.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def _open_group(member: Member, device: torch.device, timeout_s: float, watch: Watch) -> Group:
    if member.size == 1:
        return LoneGroup()
    if member.is_one_host:
        # gloo would look up the host's name, which containers often cannot.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", member.store),
        rank=member.rank,
        world_size=member.size,
        timeout=timedelta(seconds=timeout_s),
    )
    return TorchGroup(watch.describe_failure)


def _num_local_ranks(member: Member) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", member.size if member.is_one_host else 1))


def _agree(member: Member, make_job: Callable[[], Job]) -> tuple[Job, RunDir]:
    """All ranks hold rank 0's job, or all end with the sentence of the first that does not."""
    job, problem = None, ""
    try:
        job = make_job()
        if member.rank == 0:
            _publish(member, job)
    except USER_ERRORS as error:
        problem = str(error)
    if member.rank == 0 and problem:
        member.store.set("job", "")
    problem = problem or _compare(member, job)
    _exchange_verdicts(member, problem)
    run_dir = RunDir(Path(member.store.get("run_dir").decode()))
    texts = (member.store.get(f"job/{part}").decode() for part in ("config", "prompts"))
    return Job.from_texts(*texts), run_dir


def _publish(member: Member, job: Job) -> None:
    run_dir = RunDir.create(job)
    member.store.set("run_dir", str(run_dir.path))
    member.store.set("job/config", job.config_text())
    member.store.set("job/prompts", job.prompts_text())
    member.store.set("job", "published")


def _compare(member: Member, job: Job | None) -> str:
    assert job is not None
    if not member.store.get("job"):
        return ""
    theirs = Job.from_texts(member.store.get("job/config").decode(), "")
    difference = first_difference(job.config, theirs.config)
    return f"the configuration must be the same on every rank, but {difference}" if difference else ""


def _exchange_verdicts(member: Member, problem: str) -> None:
    """Raises ConfigError on every rank if any has a problem."""
    member.store.set(f"verdict/{member.rank}", problem)
    for rank in range(member.size):
        verdict = member.store.get(f"verdict/{rank}").decode()
        if verdict:
            raise ConfigError(f"rank {rank}: {verdict}")


def _redirect_output(log: Path) -> TextIO:
    """Send what this rank writes to its log; rank 0 keeps stdout, and the console for progress."""
    console = os.fdopen(os.dup(2), "w", buffering=1)
    fd = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(fd, 2)
    if os.environ["RANK"] != "0":
        os.dup2(fd, 1)
    os.close(fd)
    return console


def _report(member: Member, error: BaseException) -> int:
    """Say on stderr how this rank ended; the user's own mistakes are said by rank 0 alone."""
    if isinstance(error, USER_ERRORS):
        if member.rank == 0:
            print(f"shardrun: {error}", file=sys.stderr, flush=True)
        return EXIT_USER
    _tell_torchrun(error)
    record = ErrorRecord.of(member.rank, error)
    print(f"shardrun: {record}", file=sys.stderr, flush=True)
    if not record.is_consequence:
        print(record.traceback, file=sys.stderr, flush=True)
    return EXIT_FAILED


def _tell_torchrun(error: BaseException) -> None:
    """Leave the error where torchrun's agent looks for it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if isinstance(error, Exception) and os.environ.get("TORCHELASTIC_ERROR_FILE"):
        get_error_handler().record_exception(error)
