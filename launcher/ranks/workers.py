"""Start the agent of a plain command, and say which of its ranks failed first.

The agent (launcher/ranks/agent.py) is torch elastic. It comes from a forkserver: torch is imported
once a host, there and not in this process, and what has computed must not fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import NamedTuple, NoReturn

from launcher.failures import EXIT_USER, ErrorRecord, RunError, first_cause, one_line
from launcher.run_dir import RunDir
from launcher.timeline import Timeline

_TRACEBACK_LINES = 12
# What ends a run; of these Python itself raises for SIGINT only.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# What the launcher alone sends, to the agent and once.
STOP = signal.SIGUSR1
# Ranks that were told to end have as long before they are killed.
STOP_S = 5


class FirstFailure(NamedTuple):
    """A rank's process that failed, as elastic saw it: a signal is a negative status."""

    pid: int
    status: int


Failures = Mapping[int, FirstFailure]


class _Signal(BaseException):
    """A signal that ends the run."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def preload_torch() -> None:
    """Start the forkserver; it imports torch and our modules in the background."""
    modules = ["launcher.config", "launcher.tasks.generate", "launcher.ranks.agent"]
    multiprocessing.set_forkserver_preload(modules)
    forkserver.ensure_running()


def run_workers(run_dir: RunDir, size: int, timeline: Timeline) -> int:
    """Run the job of a run directory on `size` ranks of this host.

    Returns:
        0; 2 where a rank refused the user's input; 128 and the number of a signal that ended it.

    Raises:
        RunError: a rank failed; leads with the first.
    """
    context = multiprocessing.get_context("forkserver")
    ours, its = context.Pipe(duplex=False)
    agent = context.Process(
        target=be_agent, args=(its, run_dir, size, run_dir.job_hash(), timeline)
    )
    with _raising(SIGNALS), ours, its:
        try:
            failures = _await(agent, ours, its)
            return _explain(run_dir, failures) if failures else 0
        except _Signal as error:
            return 128 + error.number
        finally:
            _stop(agent)


def be_agent(
    launcher: Connection, run_dir: RunDir, size: int, job_hash: str, timeline: Timeline
) -> None:
    """The agent's process. Importing this module must not import torch."""
    from launcher.ranks.agent import supervise

    launcher.send(supervise(run_dir, size, job_hash, timeline))


def _await(agent: ForkServerProcess, answer: Connection, its: Connection) -> Failures:
    try:
        with _held_back(SIGNALS):
            agent.start()
    except (OSError, EOFError) as error:
        raise RunError(
            f"the ranks could not be started, their forkserver is gone ({error})"
        ) from error
    its.close()  # so that an agent that dies leaves an end, and not a wait
    agent.join()
    try:
        failures: Failures = answer.recv()
    except EOFError as error:
        raise RunError(
            f"the agent of the ranks (pid {agent.pid}) {_ending(agent.exitcode or 0)}; "
            "the ranks ended with it"
        ) from error
    return failures


def _stop(agent: ForkServerProcess) -> None:
    """Leave no process behind, also none that is stopped or hangs: ranks die with their agent."""
    if agent.pid is None or agent.exitcode is not None:
        return
    os.kill(agent.pid, STOP)
    agent.join(STOP_S)
    if agent.exitcode is None:
        agent.kill()
        agent.join()


@contextmanager
def _held_back(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Let signals come after this: a forkserver that is sent half a process prints a traceback."""
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


@contextmanager
def _raising(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Raise for the first signal, save those that were ignored before: nohup's SIGHUP."""
    before = {number: signal.getsignal(number) for number in numbers}
    heard = [number for number in numbers if before[number] is not signal.SIG_IGN]

    def end(first: int, _frame: object) -> NoReturn:
        for number in heard:
            signal.signal(number, signal.SIG_IGN)
        raise _Signal(first)

    for number in heard:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


def _explain(run_dir: RunDir, failures: Failures) -> int:
    """Turn what elastic saw and what the ranks recorded into one story."""
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


def _killed_sentence(run_dir: RunDir, killed: Failures) -> str:
    rank, failure = min(killed.items())
    return f"rank {rank} (pid {failure.pid}) {_ending(failure.status)}\nlog: {run_dir.log(rank)}"


def _wordless_sentence(run_dir: RunDir, failures: Failures) -> str:
    rank, failure = min(failures.items())
    log = run_dir.log(rank)
    tail = log.read_text(errors="replace").splitlines()[-_TRACEBACK_LINES:] if log.exists() else []
    first = f"rank {rank} (pid {failure.pid}) {_ending(failure.status)} without a word"
    return "\n".join([first, *tail, f"log: {log}"])


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by signal {-status} ({signal.Signals(-status).name})"


def _failed_story(run_dir: RunDir, cause: ErrorRecord) -> str:
    lines = cause.traceback.rstrip().splitlines()[-_TRACEBACK_LINES:]
    return "\n".join([str(cause), *lines, f"log: {run_dir.log(cause.rank)}"])
