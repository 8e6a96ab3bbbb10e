"""Start the ranks of a plain command, watch them, and say who failed first.

torch elastic starts, watches and stops the processes. They come from a forkserver that imports
torch while this process does: one that has computed must not fork, and torch is imported once a
host.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
from multiprocessing import forkserver
from typing import Any

from launcher.failures import EXIT_USER, ErrorRecord, RunError, first_cause, one_line
from launcher.run_dir import RunDir
from launcher.timeline import Timeline

_TRACEBACK_LINES = 12


def preload_torch() -> None:
    """Start the forkserver; it imports torch and our modules in the background."""
    multiprocessing.set_forkserver_preload(["launcher.worker", "launcher.tasks.generate"])
    forkserver.ensure_running()


def run_workers(run_dir: RunDir, size: int, timeline: Timeline) -> int:
    """Run the job of a run directory on `size` ranks of this host.

    Returns:
        0; 2 where a rank refused the user's input; 130 or 143 where a signal ended the run.

    Raises:
        RunError: a rank failed; leads with the first.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from launcher.worker import run_started

    _silence_elastic()
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=run_dir.path.name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        start_method="forkserver",
        monitor_interval=0.05,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=None),
    )
    timeline.mark("import_torch")
    try:
        elastic_launch(settings, run_started)(str(run_dir.path), run_dir.job_hash(), timeline)
    except ChildFailedError as error:
        return _explain(run_dir, error.failures)
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _silence_elastic() -> None:
    """Its own report names an arbitrary rank; ours is made from the records that the ranks left."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _explain(run_dir: RunDir, failures: dict[int, Any]) -> int:
    """Turn what elastic saw and what the ranks recorded into one story."""
    cause = first_cause(run_dir.errors())
    killed = {rank: failure for rank, failure in failures.items() if failure.exitcode < 0}
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


def _killed_sentence(run_dir: RunDir, killed: dict[int, Any]) -> str:
    rank, failure = min(killed.items())
    name = signal.Signals(-failure.exitcode).name
    return (
        f"rank {rank} (pid {failure.pid}) was ended by signal {-failure.exitcode} ({name})\n"
        f"log: {run_dir.log(rank)}"
    )


def _wordless_sentence(run_dir: RunDir, failures: dict[int, Any]) -> str:
    rank, failure = min(failures.items())
    log = run_dir.log(rank)
    tail = log.read_text(errors="replace").splitlines()[-_TRACEBACK_LINES:] if log.exists() else []
    first = f"rank {rank} (pid {failure.pid}) ended with status {failure.exitcode} without a word"
    return "\n".join([first, *tail, f"log: {log}"])


def _failed_story(run_dir: RunDir, cause: ErrorRecord) -> str:
    lines = cause.traceback.rstrip().splitlines()[-_TRACEBACK_LINES:]
    return "\n".join([str(cause), *lines, f"log: {run_dir.log(cause.rank)}"])
