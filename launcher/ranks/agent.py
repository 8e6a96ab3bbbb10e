"""The agent of a plain command: torch elastic, which forks the ranks, watches and stops them.

It has torch from the forkserver that it comes from, and never computes: it may fork, and its ranks
begin with torch imported. They meet at a store that has a process of its own: its server's threads
hold locks of the C library now and then, and a fork beside them could leave a rank with one for ever.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Collection
from functools import partial
from multiprocessing import connection

import torch.distributed as dist
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from launcher.environment.torchrun import TORCHRUN
from launcher.environment.worker import WorkerEnvironment
from launcher.failures import EXIT_FAILED
from launcher.ranks.worker import run_started
from launcher.ranks.workers import SIGNALS, STOP, STOP_S, Failures, FirstFailure
from launcher.run_dir import RunDir
from launcher.timeline import Timeline

_LOOK_S = 0.05
_LOOPBACK = "127.0.0.1"
# From linux/prctl.h.
_PR_SET_PDEATHSIG = 1


def supervise(run_dir: RunDir, size: int, job_hash: str, timeline: Timeline) -> Failures:
    """Run the ranks to their end; returns the first that failed, if one has.

    Raises:
        SystemExit: the launcher said stop, or is gone; no rank is left.
    """
    port = _start_store()
    _hear_only_stop()
    _silence_elastic()
    spec = WorkerSpec(
        role="rank",
        local_world_size=size,
        entrypoint=be_rank,
        # No path as a str: elastic replaces `$` in those.
        args=(run_dir, job_hash, timeline),
        rdzv_handler=_Alone(port, run_dir.path.name),
        max_restarts=0,
        monitor_interval=_LOOK_S,
        local_addr=_LOOPBACK,
    )
    # Not `elastic_launch`: its LaunchConfig asks CUDA for devices, after which no fork can use them.
    agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=os.devnull), start_method="fork")
    try:
        failures = agent.run().failures
    except SignalException:
        sys.exit(EXIT_FAILED)
    finally:
        signal.signal(STOP, signal.SIG_IGN)
        # Those that elastic had no time to note down before it was told to stop.
        for process in multiprocessing.active_children():
            process.kill()
    return {rank: FirstFailure(seen.pid, seen.exitcode) for rank, seen in failures.items()}


def be_rank(run_dir: RunDir, job_hash: str, timeline: Timeline) -> None:
    """A rank's process, from its fork on."""
    _die_with_the_agent()
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


def _start_store() -> int:
    """Start the process that hosts the store of the run; returns its port."""
    ours, its = multiprocessing.Pipe(duplex=False)
    host = multiprocessing.get_context("fork").Process(target=_host_store, args=(its,), daemon=True)
    host.start()
    its.close()
    port: int = ours.recv()
    return port


def _host_store(pipe: connection.Connection) -> None:
    """Until the agent ends, which takes this along."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _die_with_the_agent()
    store = dist.TCPStore(_LOOPBACK, 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    while True:
        signal.pause()


class _Alone(RendezvousHandler):
    """The rendezvous of an agent that has no others: no delay, no thread, no messages.

    Args:
        port: of the store, on this host.
    """

    def __init__(self, port: int, run_id: str) -> None:
        self._port = port
        self._run_id = run_id

    def get_backend(self) -> str:
        return "alone"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        store = dist.TCPStore(_LOOPBACK, self._port, is_master=False)
        place = RendezvousStoreInfo(_LOOPBACK, self._port)
        return RendezvousInfo(store, 0, 1, place)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None: ...

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def _hear_only_stop() -> None:
    """Leave to the launcher what ends a run: a signal to the whole group would come twice.

    Elastic raises for each anew, also while it stops the ranks.
    """
    # All but those that were ignored before: nohup's SIGHUP.
    heard = {number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = STOP.name
    os.register_at_fork(after_in_child=partial(_die_of, {*heard, STOP}))
    threading.Thread(target=_stop_with_the_launcher, daemon=True).start()
    # Its one thread waits for the launcher: a fork finds no lock held.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)


def _die_of(signals: Collection[signal.Signals]) -> None:
    """In a rank: at once, also inside a collective, which a handler of Python's would wait for."""
    for number in signals:
        signal.signal(number, signal.SIG_DFL)


def _die_with_the_agent() -> None:
    """Have the kernel kill this rank when its agent is gone; torch's own SIGINT waits for a SIGCONT.

    Where there is no such call, a rank sees for itself that the store is gone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


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
