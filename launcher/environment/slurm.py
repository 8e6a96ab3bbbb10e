"""Slurm's srun, and what a Slurm job says to whoever runs inside it."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.environment.launcher import Launcher
from launcher.environment.variables import integer, port
from launcher.failures import LaunchError

# Slurm numbers its special steps from here on: batch, extern and interactive shells are not srun's.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


class Slurm(Launcher):
    """srun's tasks; a batch script has a SLURM_PROCID too, and is none of them."""

    def has_started(self, environ: Mapping[str, str]) -> bool:
        step = environ.get("SLURM_STEP_ID", "")
        is_step = step.isdigit() and int(step) < _FIRST_SPECIAL_STEP
        return is_step and super().has_started(environ)

    def store(self, environ: Mapping[str, str], size: int) -> str | None:
        if environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
            return None
        nodes = environ.get("SLURM_STEP_NODELIST", "")
        return address_of_rank_0(self, environ, size, nodes, integer(environ, "SLURM_STEP_ID"))

    def job(self, environ: Mapping[str, str], parent_pid: int) -> str:
        return f"{self.name}-{environ.get('SLURM_JOB_ID')}-{environ.get('SLURM_STEP_ID')}"


SLURM = Slurm(
    "slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"
)


def address_of_rank_0(
    launcher: Launcher, environ: Mapping[str, str], size: int, nodes: str, step: int | None
) -> str:
    """What the user exported, else the first node and a port of the Slurm job.

    Args:
        nodes: as Slurm lists them; empty out of Slurm.
        step: the job's, where srun started the ranks: mpirun's see that of their node's daemon.
    """
    host = environ.get("MASTER_ADDR") or first_host(nodes)
    given = environ.get("MASTER_PORT")
    number = port(environ, "MASTER_PORT") if given else _port_of_job(environ, step)
    if not host or number is None:
        raise LaunchError(
            f"{launcher.name} started {size} ranks on several hosts, and MASTER_ADDR and "
            "MASTER_PORT are not set; export rank 0's host and a free port of it."
        )
    return f"{host}:{number}"


def first_host(nodelist: str) -> str:
    """The first name of a Slurm node list: `n[03-05,9],m1` -> `n03`."""
    head, bracket, tail = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.split(",")[0]
    first = tail.replace("]", ",").replace("-", ",").split(",")[0]
    return head + first + tail.partition("]")[2].split(",")[0]


def _port_of_job(environ: Mapping[str, str], step: int | None) -> int | None:
    """The step's reserved port, or one that neighbouring jobs do not share; None out of Slurm."""
    job = integer(environ, "SLURM_JOB_ID")
    reserved = environ.get("SLURM_STEP_RESV_PORTS", "").split("-")[0].split(",")[0]
    if step is not None and reserved.isdecimal():
        return int(reserved)
    return None if job is None else 20000 + (job * 97 + (step or 0)) % 12000
