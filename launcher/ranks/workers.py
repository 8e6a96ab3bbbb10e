"""Start the agent of a plain command, and stop it.

The agent (launcher/ranks/agent.py) is torch elastic. It comes from a forkserver: torch is imported
once a host, there and not in this process, and what has computed must not fork.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

from launcher.failures import RunError
from launcher.ranks.explanation import Failures, explain, in_words
from launcher.ranks.signals import SIGNALS, STOP, STOP_S, EndingSignal, held_back, raising
from launcher.run_dir import RunDir
from launcher.timeline import Timeline


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
    with raising(SIGNALS), ours, its:
        try:
            failures = _await(agent, ours, its)
            return explain(run_dir, failures) if failures else 0
        except EndingSignal as error:
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
        with held_back(SIGNALS):
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
            f"the agent of the ranks (pid {agent.pid}) {in_words(agent.exitcode or 0)}; "
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
