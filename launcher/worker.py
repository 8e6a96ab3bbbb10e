"""The life of one rank: arrive, meet the others, do the task's part, say goodbye.

`run_started` is for ranks that we start (launcher/agent.py), `run_external` for ranks that
torchrun, MindSpore, Slurm or MPI start.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from launcher.collectives import open_group
from launcher.cores import Taken, read_wishes, take_seat
from launcher.device import resolve_device
from launcher.environment import WorkerEnvironment
from launcher.failures import (
    EXIT_FAILED,
    EXIT_USER,
    USER_ERRORS,
    ConfigError,
    ErrorRecord,
)
from launcher.job import Job, first_difference
from launcher.long_text import get_text, set_text
from launcher.rank import Rank
from launcher.rendezvous import (
    Deadline,
    Member,
    arrival_deadline,
    join,
    say_ended,
    wait_for,
)
from launcher.run_dir import RunDir
from launcher.schema import ParallelSection
from launcher.tasks import rank_task
from launcher.timeline import Timeline
from launcher.watch import StuckRankError, Watch
from parallel.errors import PeerError

_AFTER_THE_CAUSE_S = 0.5
# In ranks that we start: when their forkserver had imported torch.
_IMPORTED_AT = time.time()
# What a rank does with its error before it leaves; returns its exit status.
Recorder = Callable[[BaseException], int]
# Checks the job of this process's own command line, its prompts only if asked to; returns it with
# what is to be said about it.
JobMaker = Callable[[bool], tuple[Job, tuple[str, ...]]]


def run_started(
    environment: WorkerEnvironment, run_path: str, job_hash: str, timeline: Timeline
) -> None:
    """Entry point of a rank that we started: its output goes to its log, its error to a record."""
    timeline.mark("import_torch", _IMPORTED_AT)
    timeline.mark("start_ranks")
    run_dir, rank = RunDir(Path(run_path)), environment.rank
    assert rank is not None
    console = _redirect_output(run_dir.log(rank), rank)

    def record(error: BaseException) -> int:
        found = _record(rank, error)
        print(found.traceback, file=sys.stderr)
        found.write(run_dir.error(rank))
        if found.is_consequence:
            # elastic stops all ranks when it sees one end: it must see the first before it sees us.
            time.sleep(_AFTER_THE_CAUSE_S)
        return EXIT_FAILED

    try:
        job = run_dir.read_job(job_hash)
        member = join(environment, job.config.parallel.start_timeout_s)
    except BaseException as error:
        _leave(record(error))
    timeline.mark("rendezvous")
    _live(member, lambda watch: _do_task(member, watch, job, run_dir, console, timeline), record)


def run_external(
    environment: WorkerEnvironment,
    make_job: JobMaker,
    timeline: Timeline,
    start_timeout_s: float = 300.0,
) -> int:
    """Entry point of a rank that somebody else started: its output is theirs to collect.

    Args:
        make_job: asked for the prompts on rank 0 alone: they may come from a stdin that all share.

    Returns:
        0; a failed rank leaves the process with its status.
    """
    timeline.mark("import_torch")
    member = join(environment, start_timeout_s)
    timeline.mark("rendezvous")

    def work(watch: Watch) -> None:
        job, run_dir = _agree(member, make_job, arrival_deadline(environment, start_timeout_s))
        timeline.mark("agreement")
        _do_task(member, watch, job, run_dir, sys.stderr, timeline)

    _live(member, work, lambda error: _report(member, error))
    return 0


def _live(member: Member, work: Callable[[Watch], None], record: Recorder) -> None:
    """Work, and tell the others how it ended: what failed first must be known before we leave."""
    watch = Watch(member, lambda sentence: _end(member, PeerError(sentence), record))
    watch.start()
    try:
        work(watch)
    except BaseException as error:
        error = _explained(error, watch)
        watch.stop()
        _end(member, error, record)
    watch.stop()
    say_ended(member, 0, "", is_cause=False)


def _explained(error: BaseException, watch: Watch) -> BaseException:
    """A message to the rendezvous that fails is another process's failure."""
    if not isinstance(error, dist.DistError):
        return error
    try:
        return PeerError(watch.describe_failure("a message to the rendezvous"))
    except StuckRankError as stuck:
        return stuck


def _end(member: Member, error: BaseException, record: Recorder) -> None:
    """Leave with an error, also from inside a collective that would never return."""
    status = record(error)
    # Who failed because of another says what it saw, and is not taken for the cause.
    is_cause = not isinstance(error, PeerError)
    message = str(error) if isinstance(error, PeerError | StuckRankError) else _named(error)
    say_ended(member, status, message, is_cause=is_cause)
    _leave(status)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _leave(status: int) -> None:
    """End at once: a broken process group can block an ordinary exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _do_task(
    member: Member, watch: Watch, job: Job, run_dir: RunDir, console: TextIO, timeline: Timeline
) -> None:
    device = resolve_device(job.config.device, member.local_rank)
    seat = _take_seat(member, job.config.parallel, device, console)
    group = open_group(member, device, job.config.parallel, watch)
    watch.follow(lambda: sum(group.counts.values()))
    timeline.mark("process_group")
    rank_task(job.config.task.name)(Rank(job, group, device, run_dir, console, timeline, seat))
    if dist.is_initialized():
        dist.destroy_process_group()


def _take_seat(
    member: Member, section: ParallelSection, device: torch.device, console: TextIO
) -> Taken:
    """Bind this rank to its share of the host's cores, before anything is computed."""
    wishes = read_wishes(section.threads, section.pin, os.environ)
    if device.type == "cuda":
        wishes = replace(wishes, floating="the ranks compute on GPUs")
    allowed = [frozenset(member.places[rank]["cores"]) for rank in member.ranks_here]
    seat = take_seat(allowed, member.ranks_here.index(member.rank), wishes)
    if seat.refused:
        print(f"shardrun: rank {member.rank}: {seat.refused}", file=console)
    if wishes.note and member.rank == 0:
        print(f"shardrun: {wishes.note}", file=console)
    return seat


def _agree(member: Member, make_job: JobMaker, deadline: Deadline) -> tuple[Job, RunDir]:
    """All ranks hold rank 0's job, or all end with the sentence of the first that does not."""
    job, problem = None, ""
    try:
        job, notes = make_job(member.rank == 0)
        if member.rank == 0:
            _publish(member, job)
            for note in notes:
                print(f"shardrun: {note}", file=sys.stderr, flush=True)
    except USER_ERRORS as error:
        problem = str(error)
    if member.rank == 0 and problem:
        member.store.set("job/0", "")
    problem = problem or _compare(member, job, deadline)
    _exchange_verdicts(member, problem, deadline)
    run_dir = RunDir(Path(member.store.get("run_dir").decode()))
    config_text = member.store.get("job/config").decode()
    return Job.from_texts(config_text, get_text(member.store, "job/prompts")), run_dir


def _publish(member: Member, job: Job) -> None:
    run_dir = RunDir.create(job)
    member.store.set("run_dir", str(run_dir.path))
    member.store.set("job/config", job.config_text())
    set_text(member.store, "job/prompts", job.prompts_text())
    member.store.set("job/0", "published")


def _compare(member: Member, job: Job | None, deadline: Deadline) -> str:
    assert job is not None
    if not wait_for(member.store, "job", 1, deadline, "read its job")[0]:
        return ""
    theirs = Job.from_texts(member.store.get("job/config").decode(), "")
    difference = first_difference(job.config, theirs.config)
    rule = "the configuration must be the same on every rank"
    return f"{rule}, but {difference}" if difference else ""


def _exchange_verdicts(member: Member, problem: str, deadline: Deadline) -> None:
    """Raises ConfigError on every rank if any has a problem."""
    member.store.set(f"verdict/{member.rank}", problem)
    for rank, verdict in enumerate(
        wait_for(member.store, "verdict", member.size, deadline, "read its job")
    ):
        if verdict:
            raise ConfigError(f"rank {rank}: {verdict.decode()}")


def _redirect_output(log: Path, rank: int) -> TextIO:
    """Send what this rank writes to its log; rank 0 keeps stdout, and the console for progress."""
    console = os.fdopen(os.dup(2), "w", buffering=1)
    fd = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(fd, 2)
    if rank != 0:
        os.dup2(fd, 1)
    os.close(fd)
    return console


def _report(member: Member, error: BaseException) -> int:
    """Say on stderr how this rank ended; the user's own mistakes are said by rank 0 alone."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, USER_ERRORS):
        if member.rank == 0:
            print(f"shardrun: {error}", file=sys.stderr, flush=True)
        return EXIT_USER
    record = _record(member.rank, error)
    _say(member, error, record)
    _tell_torchrun(error)
    if not record.is_consequence:
        print(record.traceback, file=sys.stderr, flush=True)
    return EXIT_FAILED


def _record(rank: int, error: BaseException) -> ErrorRecord:
    """The record of an error; one that another rank brought about by hanging is that rank's."""
    record = ErrorRecord.of(rank, error)
    if isinstance(error, StuckRankError):
        place = error.place
        record = replace(
            record,
            rank=error.rank,
            host=place["host"],
            pid=place["pid"],
            message=f"it did not answer: {error.reason}",
        )
    return record


def _say(member: Member, error: BaseException, record: ErrorRecord) -> None:
    """What came from another rank leads with that one."""
    is_about_other = isinstance(error, PeerError | StuckRankError)
    line = f"{error} (said rank {member.rank})" if is_about_other else str(record)
    print(f"shardrun: {line}", file=sys.stderr, flush=True)


def _tell_torchrun(error: BaseException) -> None:
    """Leave the error where torchrun's agent looks for it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if isinstance(error, Exception) and os.environ.get("TORCHELASTIC_ERROR_FILE"):
        get_error_handler().record_exception(error)
