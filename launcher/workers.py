"""Start the ranks of a plain command, watch them, and say who failed first.

They come from a forkserver: torch is imported once a host, there and not in this process, and what
has computed must not fork. The ranks meet as those of any launcher do, at a store that rank 0 hosts.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from typing import NoReturn

from launcher.environment import WorkerEnvironment
from launcher.failures import EXIT_FAILED, EXIT_USER, ErrorRecord, RunError, first_cause, one_line
from launcher.run_dir import RunDir
from launcher.timeline import Timeline

_TRACEBACK_LINES = 12
# What ends a run; of these Python itself raises for SIGINT only.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# Ranks that were told to end have as long before they are killed.
_STOP_S = 5.0

Ranks = Sequence[ForkServerProcess]


class _Signal(BaseException):
    """A signal that ends the run."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def preload_torch() -> None:
    """Start the forkserver; it imports torch and our modules in the background."""
    modules = ["launcher.config", "launcher.tasks.generate", "launcher.worker"]
    multiprocessing.set_forkserver_preload(modules)
    forkserver.ensure_running()


def run_workers(run_dir: RunDir, size: int, timeline: Timeline) -> int:
    """Run the job of a run directory on `size` ranks of this host.

    Returns:
        0; 2 where a rank refused the user's input; 130 or 143 where a signal ended the run.

    Raises:
        RunError: a rank failed; leads with the first.
    """
    # Unlike a run directory's name, no other run on this host can have it.
    job = f"plain-{os.getpid()}-{secrets.token_hex(6)}"
    places = [
        WorkerEnvironment(size=size, rank=rank, local_rank=rank, job=job) for rank in range(size)
    ]
    arguments = (str(run_dir.path), run_dir.job_hash(), timeline)
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=be_rank, args=(place, *arguments)) for place in places]
    try:
        with _raising(_SIGNALS):
            _start(ranks)
            failed = _wait(ranks)
            return _explain(run_dir, failed) if failed else 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except _Signal as error:
        return 128 + error.number
    finally:
        _stop(ranks)
        places[0].announcement.unlink(missing_ok=True)


def be_rank(
    environment: WorkerEnvironment, run_path: str, job_hash: str, timeline: Timeline
) -> None:
    """A rank's process, from its fork on. Importing this module must not import torch."""
    from launcher.worker import run_started

    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    run_started(environment, run_path, job_hash, timeline)


def _end_with_the_launcher() -> None:
    """A launcher that was killed stops no rank; nobody would read what they go on to say."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    connection.wait([launcher.sentinel])
    os._exit(EXIT_FAILED)


def _start(ranks: Ranks) -> None:
    try:
        for process in ranks:
            process.start()
    except (OSError, EOFError) as error:
        raise RunError(
            f"the ranks could not be started, their forkserver is gone ({error})"
        ) from error


def _wait(ranks: Ranks) -> dict[int, ForkServerProcess]:
    """Those that failed, as soon as one has; none once all have ended well."""
    while True:
        failed = {rank: process for rank, process in enumerate(ranks) if process.exitcode}
        running = [process.sentinel for process in ranks if process.exitcode is None]
        if failed or not running:
            return failed
        connection.wait(running)


def _stop(ranks: Ranks) -> None:
    """Leave no rank behind, also none that is stopped or hangs."""
    started = [process for process in ranks if process.pid is not None]
    for process in started:
        process.terminate()
    for process in started:
        process.join(_STOP_S)
        if process.exitcode is None:
            process.kill()
            process.join()


@contextmanager
def _raising(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Raise for signals, save those that were ignored before: nohup's SIGHUP."""

    def end(number: int, _frame: object) -> NoReturn:
        raise _Signal(number)

    before = {number: signal.getsignal(number) for number in numbers}
    heard = [number for number in numbers if before[number] is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


def _explain(run_dir: RunDir, failures: Mapping[int, ForkServerProcess]) -> int:
    """Turn what was seen and what the ranks recorded into one story."""
    cause = first_cause(run_dir.errors())
    killed = {rank: process for rank, process in failures.items() if (process.exitcode or 0) < 0}
    if killed and (cause is None or cause.is_consequence):
        raise RunError(_killed_sentence(run_dir, killed))
    if cause is None:
        raise RunError(_wordless_sentence(run_dir, failures))
    if cause.is_user_error:
        print(f"shardrun: {one_line(cause.message)}", file=sys.stderr)
        return EXIT_USER
    if cause.is_consequence:
        # The rank that it names is gone without a word; nobody saw which went first.
        raise RunError(f"{cause.message} (said rank {cause.rank})\nlog: {run_dir.log(cause.rank)}")
    raise RunError(_failed_story(run_dir, cause))


def _killed_sentence(run_dir: RunDir, killed: Mapping[int, ForkServerProcess]) -> str:
    rank, process = min(killed.items())
    number = signal.Signals(-(process.exitcode or 0))
    return (
        f"rank {rank} (pid {process.pid}) was ended by signal {number} ({number.name})\n"
        f"log: {run_dir.log(rank)}"
    )


def _wordless_sentence(run_dir: RunDir, failures: Mapping[int, ForkServerProcess]) -> str:
    rank, process = min(failures.items())
    log = run_dir.log(rank)
    tail = log.read_text(errors="replace").splitlines()[-_TRACEBACK_LINES:] if log.exists() else []
    first = f"rank {rank} (pid {process.pid}) ended with status {process.exitcode} without a word"
    return "\n".join([first, *tail, f"log: {log}"])


def _failed_story(run_dir: RunDir, cause: ErrorRecord) -> str:
    lines = cause.traceback.rstrip().splitlines()[-_TRACEBACK_LINES:]
    return "\n".join([str(cause), *lines, f"log: {run_dir.log(cause.rank)}"])
