"""The life of one rank: arrive, meet the others, do the task's part, say goodbye.

`run_started` is for ranks that we start (launcher/ranks/agent.py), `run_external` for ranks that
torchrun, MindSpore, Slurm or MPI start.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from launcher.environment.worker import WorkerEnvironment
from launcher.failures import EXIT_FAILED
from launcher.host.device import resolve_device
from launcher.host.seat import Taken, take_seat
from launcher.host.wishes import read_wishes
from launcher.job import Job
from launcher.ranks.agreement import JobMaker, agree
from launcher.ranks.collectives import open_group
from launcher.ranks.deadline import arrival_deadline
from launcher.ranks.member import Member
from launcher.ranks.rank import Rank
from launcher.ranks.rendezvous import join, say_ended
from launcher.ranks.report import in_words, record_of, report
from launcher.ranks.watch import StuckRankError, Watch
from launcher.run_dir import RunDir
from launcher.schema import ParallelSection
from launcher.tasks import rank_task
from launcher.timeline import Timeline
from parallel.errors import PeerError

_AFTER_THE_CAUSE_S = 0.5
# In ranks that we start: when their forkserver had imported torch.
_IMPORTED_AT = time.time()
# What a rank does with its error before it leaves; returns its exit status.
Recorder = Callable[[BaseException], int]


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
        found = record_of(rank, error)
        print(found.traceback or found, file=sys.stderr)
        found.write(run_dir.error(rank))
        if found.is_consequence:
            # elastic stops all ranks when it sees one end: it must see the first before it sees us.
            time.sleep(_AFTER_THE_CAUSE_S)
        return EXIT_FAILED

    try:
        job = run_dir.read_job(job_hash)
        member = join(environment, job.config.parallel.start_timeout_s, console)
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
        job, run_dir = agree(member, make_job, arrival_deadline(environment, start_timeout_s))
        timeline.mark("agreement")
        _do_task(member, watch, job, run_dir, sys.stderr, timeline)

    _live(member, work, lambda error: report(member.rank, error))
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
    say_ended(member, status, in_words(error), is_cause=is_cause)
    _leave(status)


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
    watch.follow(lambda: sum(group.counts.values()), job.config.parallel.timeout_s)
    timeline.mark("process_group")
    rank = Rank(job, group, device, run_dir, console, timeline, seat, watch.say_doing)
    rank_task(job.config.task.name)(rank)
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


def _redirect_output(log: Path, rank: int) -> TextIO:
    """Send what this rank writes to its log; rank 0 keeps stdout, and the console for progress."""
    console = os.fdopen(os.dup(2), "w", buffering=1)
    fd = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(fd, 2)
    if rank != 0:
        os.dup2(fd, 1)
    os.close(fd)
    return console
