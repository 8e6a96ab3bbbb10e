"""Ranks that others started agree on rank 0's job and run directory, or all refuse in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from launcher.failures import USER_ERRORS, ConfigError
from launcher.job import Job, first_difference
from launcher.ranks.arrival import wait_for
from launcher.ranks.deadline import Deadline
from launcher.ranks.long_text import get_text, set_text
from launcher.ranks.member import Member
from launcher.ranks.notice import Notice
from launcher.run_dir import RunDir

# Checks the job of this process's own command line, its prompts only if asked to; returns it with
# what is to be said about it.
JobMaker = Callable[[bool], tuple[Job, tuple[str, ...]]]


def agree(member: Member, make_job: JobMaker, deadline: Deadline) -> tuple[Job, RunDir]:
    """All ranks hold rank 0's job, or all end with the sentence of the first that does not.

    Raises:
        ConfigError: what is wrong with this rank's job or another's.
        RunError: a rank is missing at the deadline.
    """
    job, problem = None, ""
    try:
        job, notes = make_job(member.rank == 0)
        if member.rank == 0:
            _publish(member, job)
            for note in notes:
                print(f"shardrun: {note}", file=member.console, flush=True)
    except USER_ERRORS as error:
        problem = str(error)
    if member.rank == 0 and problem:
        member.store.set("job/0", "")
    with Notice(member.console, f"rank {member.rank}", deadline).given() as notice:
        notice.elect(member.store, "agreement")
        problem = problem or _compare(member, job, deadline, notice)
        _exchange_verdicts(member, problem, deadline, notice)
    run_dir = RunDir(Path(member.store.get("run_dir").decode()))
    config_text = member.store.get("job/config").decode()
    return Job.from_texts(config_text, get_text(member.store, "job/prompts")), run_dir


def _publish(member: Member, job: Job) -> None:
    run_dir = RunDir.create(job)
    member.store.set("run_dir", str(run_dir.path))
    member.store.set("job/config", job.config_text())
    set_text(member.store, "job/prompts", job.prompts_text())
    member.store.set("job/0", "published")


def _compare(member: Member, job: Job | None, deadline: Deadline, notice: Notice) -> str:
    assert job is not None
    (published,) = wait_for(
        member.store, "job", member.size, deadline, notice, "read its job", ranks=[0]
    )
    if not published:
        return ""
    theirs = Job.from_texts(member.store.get("job/config").decode(), "")
    difference = first_difference(job.config, theirs.config)
    rule = "the configuration must be the same on every rank"
    return f"{rule}, but {difference}" if difference else ""


def _exchange_verdicts(member: Member, problem: str, deadline: Deadline, notice: Notice) -> None:
    """Raises ConfigError on every rank if any has a problem."""
    member.store.set(f"verdict/{member.rank}", problem)
    for rank, verdict in enumerate(
        wait_for(member.store, "verdict", member.size, deadline, notice, "read its job")
    ):
        if verdict:
            raise ConfigError(f"rank {rank}: {verdict.decode()}")
