"""The agent of a plain command: torch elastic, which forks the ranks, watches and stops them.

It has torch from the forkserver that it comes from, and never computes: it may fork, and its ranks
begin with torch imported. They meet at a store that has a process of its own: its server's threads
hold locks of the C library now and then, and a fork beside them could leave a rank with one for ever.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
import time
import warnings
from multiprocessing import connection

from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException

from launcher.environment.torchrun import TORCHRUN
from launcher.environment.worker import WorkerEnvironment
from launcher.failures import EXIT_FAILED
from launcher.ranks.alone import Alone
from launcher.ranks.explanation import Failures, FirstFailure
from launcher.ranks.signals import STOP, STOP_S, die_with_parent, ignore, leave_to_the_launcher
from launcher.ranks.store_process import start_store_process
from launcher.ranks.tcp_store import LOOPBACK
from launcher.ranks.worker import run_started
from launcher.run_dir import RunDir
from launcher.timeline import Timeline

_LOOK_S = 0.05


def supervise(run_dir: RunDir, size: int, job_hash: str, timeline: Timeline) -> Failures:
    """Run the ranks to their end; returns the first that failed, if one has.

    Raises:
        SystemExit: the launcher said stop, or is gone; no rank is left.
    """
    port = start_store_process()
    _hear_only_stop()
    _silence_elastic()
    spec = WorkerSpec(
        role="rank",
        local_world_size=size,
        entrypoint=be_rank,
        # No path as a str: elastic replaces `$` in those.
        args=(run_dir, job_hash, timeline),
        rdzv_handler=Alone(port, run_dir.path.name),
        max_restarts=0,
        monitor_interval=_LOOK_S,
        local_addr=LOOPBACK,
    )
    # Not `elastic_launch`: its LaunchConfig asks CUDA for devices, after which no fork can use them.
    agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=os.devnull), start_method="fork")
    try:
        failures = agent.run().failures
    except SignalException:
        sys.exit(EXIT_FAILED)
    finally:
        ignore([STOP])
        # Those that elastic had no time to note down before it was told to stop.
        for process in multiprocessing.active_children():
            process.kill()
    return {rank: FirstFailure(seen.pid, seen.exitcode) for rank, seen in failures.items()}


def be_rank(run_dir: RunDir, job_hash: str, timeline: Timeline) -> None:
    """A rank's process, from its fork on."""
    die_with_parent()
    environ = os.environ
    environment = WorkerEnvironment(
        launcher=TORCHRUN.name,
        size=int(environ[TORCHRUN.size]),
        rank=int(environ[TORCHRUN.rank]),
        local_rank=int(environ[TORCHRUN.local_rank]),
        store=f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}",
        job=run_dir.path.name,
    )
    run_started(environment, str(run_dir.path), job_hash, timeline)


def _hear_only_stop() -> None:
    """What ends a run is the launcher's to hear: elastic raises anew also while it stops the ranks."""
    leave_to_the_launcher()
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = STOP.name
    threading.Thread(target=_stop_with_the_launcher, daemon=True).start()
    # Its one thread waits for the launcher: a fork finds no lock held.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)


def _stop_with_the_launcher() -> None:
    """A launcher that was killed stops nobody; nobody would read what the ranks go on to say."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    connection.wait([launcher.sentinel])
    os.kill(os.getpid(), STOP)
    # As long as the launcher would wait for us: elastic waits for longer, and ranks die with us.
    time.sleep(STOP_S)
    os._exit(EXIT_FAILED)


def _silence_elastic() -> None:
    """Its own report names a rank without its words; ours has the records that the ranks left."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
