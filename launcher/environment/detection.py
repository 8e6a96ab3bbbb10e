"""Which launcher started this process, and what it says of rank and size.

torchrun, MindSpore's `MS_*`, Slurm's srun, Open MPI and PMI each set variables of their own; all of
them become one WorkerEnvironment. The innermost launcher decides: torchrun, msrun and mpirun run
inside srun's tasks. Contradictions are refused with every value that was seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from launcher.environment import mindspore
from launcher.environment.launcher import Launcher
from launcher.environment.mpi import OPENMPI, PMI
from launcher.environment.size import check_sizes
from launcher.environment.slurm import SLURM
from launcher.environment.torchrun import TORCHRUN, check_stray_rank
from launcher.environment.variables import integer, positive
from launcher.environment.worker import WorkerEnvironment
from launcher.failures import LaunchError

# The innermost launcher first: torchrun inside srun is torchrun. MindSpore's role goes before all.
LAUNCHERS: tuple[Launcher, ...] = (TORCHRUN, OPENMPI, PMI, SLURM)

# What `shardrun env` shows, beside whatever starts with MS_.
_SEEN = sorted(
    {
        *(name for item in LAUNCHERS for name in (item.rank, item.size, item.local_rank)),
        *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID"),
        *("SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST", "RANK_ID", "RANK_SIZE", "DEVICE_ID"),
        *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    }
)


def seen_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter to the choice, as they are set."""
    names = [name for name in environ if name.startswith("MS_") or name in _SEEN]
    return {name: environ[name] for name in sorted(names)}


def detect(environ: Mapping[str, str], *, parent_pid: int = 0) -> WorkerEnvironment:
    """Read the process environment.

    Args:
        parent_pid: tells jobs of one host apart where the launcher gives no number.

    Raises:
        LaunchError: half of a launcher's variables, a number that is none, or launchers that
            contradict each other.
    """
    check_stray_rank(environ)
    found = [item for item in LAUNCHERS if item.has_started(environ)]
    if "MS_ROLE" in environ:
        if TORCHRUN in found:
            raise LaunchError(_contradiction("MS_ROLE and torchrun's RANK", environ))
        environment = replace(
            mindspore.read_environment(environ), notes=_around(mindspore.NAME, found)
        )
    elif found:
        _check_hand_set(found, environ)
        environment = _ranked(found[0], found[1:], environ, parent_pid)
    else:
        environment = _plain(environ)
    stray = None if TORCHRUN in found else positive(environ, "WORLD_SIZE")
    environment = replace(environment, stray_size=stray)
    if not environment.is_plain:
        # At once: a rank of too few would wait for those that nobody starts.
        check_sizes(environment, None)
    return environment


def _plain(environ: Mapping[str, str]) -> WorkerEnvironment:
    requested = positive(environ, "MS_WORKER_NUM")
    return WorkerEnvironment(requested_size=requested, notes=_stale_notes(environ))


def _stale_notes(environ: Mapping[str, str]) -> tuple[str, ...]:
    """MindSpore's variables that mean nothing without a role."""
    names = ("RANK_ID", "RANK_SIZE", "DEVICE_ID", "MS_NODE_ID")
    stale = [name for name in names if name in environ]
    return (f"{', '.join(stale)} set without MS_ROLE: not used",) if stale else ()


def _ranked(
    launcher: Launcher,
    outer: list[Launcher],
    environ: Mapping[str, str],
    parent_pid: int,
) -> WorkerEnvironment:
    size, rank = positive(environ, launcher.size), integer(environ, launcher.rank)
    assert size is not None
    assert rank is not None
    if not 0 <= rank < size:
        raise LaunchError(
            f"{launcher.rank} must be below {launcher.size}={size}, but is {rank}; unset stale "
            "ones."
        )
    if size == 1 and launcher is not TORCHRUN:
        # One task that wants several ranks on its node: srun or mpirun only gave it a place.
        note = f"{launcher.name} started one task: ranks are ours to start"
        plain = _plain(environ)
        return replace(plain, notes=(note, *plain.notes))
    store = launcher.store(environ, size)
    return WorkerEnvironment(
        launcher=launcher.name,
        size=size,
        rank=rank,
        local_rank=integer(environ, launcher.local_rank),
        store=store,
        job=launcher.job(environ, parent_pid if store is None else 0),
        requested_size=positive(environ, "MS_WORKER_NUM"),
        notes=(*_around(launcher.name, outer), *_stale_notes(environ)),
    )


def _around(inner: str, outer: list[Launcher]) -> tuple[str, ...]:
    return tuple(f"{item.name} is around {inner}, which decides" for item in outer)


def _check_hand_set(found: list[Launcher], environ: Mapping[str, str]) -> None:
    """RANK and WORLD_SIZE that no torchrun set are a script's, and must be its launcher's."""
    if found[0] is not TORCHRUN or "TORCHELASTIC_RUN_ID" in environ:
        return
    outer = [item for item in found[1:] if environ[item.size] != "1"]
    if any(environ[item.rank] != environ[TORCHRUN.rank] for item in outer):
        raise LaunchError(_contradiction("two launchers' ranks", environ))
    if any(environ[item.size] != environ[TORCHRUN.size] for item in outer):
        raise LaunchError(_contradiction("two launchers' sizes", environ))


def _contradiction(what: str, environ: Mapping[str, str]) -> str:
    listed = ", ".join(f"{name}={value}" for name, value in seen_variables(environ).items())
    return f"{what} contradict each other ({listed}); unset the stale ones."
