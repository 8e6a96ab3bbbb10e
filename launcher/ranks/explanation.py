"""Why a run failed: what elastic saw and what the ranks recorded, as one story."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from typing import NamedTuple

from launcher.failures import EXIT_USER, ErrorRecord, RunError, first_cause, one_line
from launcher.run_dir import RunDir

_TRACEBACK_LINES = 12


class FirstFailure(NamedTuple):
    """A rank's process that failed, as elastic saw it: a signal is a negative status."""

    pid: int
    status: int


Failures = Mapping[int, FirstFailure]


def explain(run_dir: RunDir, failures: Failures) -> int:
    """The status to leave with, where a rank refused the user's input; that is said on stderr.

    Raises:
        RunError: a rank failed; leads with the first.
    """
    cause = first_cause(run_dir.errors())
    killed = {rank: failure for rank, failure in failures.items() if failure.status < 0}
    if killed and (cause is None or cause.is_consequence):
        raise RunError(_killed_sentence(run_dir, killed))
    if cause is None:
        raise RunError(_wordless_sentence(run_dir, failures))
    if cause.is_user_error:
        print(f"shardrun: {one_line(cause.message)}", file=sys.stderr)
        return EXIT_USER
    if cause.is_consequence:
        # The rank that it names is gone without a word; elastic did not see which went first.
        raise RunError(f"{cause.message} (said rank {cause.rank})\nlog: {run_dir.log(cause.rank)}")
    raise RunError(_failed_story(run_dir, cause))


def in_words(status: int) -> str:
    """How a process ended."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by signal {-status} ({signal.Signals(-status).name})"


def _killed_sentence(run_dir: RunDir, killed: Failures) -> str:
    rank, failure = min(killed.items())
    return f"rank {rank} (pid {failure.pid}) {in_words(failure.status)}\nlog: {run_dir.log(rank)}"


def _wordless_sentence(run_dir: RunDir, failures: Failures) -> str:
    rank, failure = min(failures.items())
    log = run_dir.log(rank)
    tail = log.read_text(errors="replace").splitlines()[-_TRACEBACK_LINES:] if log.exists() else []
    first = f"rank {rank} (pid {failure.pid}) {in_words(failure.status)} without a word"
    return "\n".join([first, *tail, f"log: {log}"])


def _failed_story(run_dir: RunDir, cause: ErrorRecord) -> str:
    lines = cause.traceback.rstrip().splitlines()[-_TRACEBACK_LINES:]
    first = str(cause) if lines else cause.message
    return "\n".join([first, *lines, f"log: {run_dir.log(cause.rank)}"])
