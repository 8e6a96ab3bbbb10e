"""Which launcher started this process, and what it says of rank and size.

torchrun, MindSpore's `MS_*`, Slurm's srun, Open MPI and PMI each set variables of their own; all of
them become one WorkerEnvironment. The innermost launcher decides: torchrun, msrun and mpirun run
inside srun's tasks. Contradictions are refused with every value that was seen.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.failures import LaunchError

# Slurm numbers its special steps from here on: batch, extern and interactive shells are not srun's.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class LauncherVariables:
    """The variables of one launcher. A process is one of its ranks if `rank` and `size` are set."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str


# The innermost launcher first: torchrun inside srun is torchrun.
TORCHRUN = LauncherVariables("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OPENMPI = LauncherVariables(
    "openmpi",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
PMI = LauncherVariables("pmi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
SLURM = LauncherVariables(
    "slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"
)
MINDSPORE = LauncherVariables("mindspore", "RANK_ID", "MS_WORKER_NUM", "DEVICE_ID", "")
_BY_RANK = (TORCHRUN, OPENMPI, PMI, SLURM)

# What `shardrun env` shows, beside whatever starts with MS_.
SEEN = sorted(
    {
        *(name for item in _BY_RANK for name in (item.rank, item.size, item.local_rank)),
        *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID"),
        *("SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST", "RANK_ID", "RANK_SIZE", "DEVICE_ID"),
        *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    }
)


@dataclass(frozen=True)
class WorkerEnvironment:
    """What the process environment says.

    Attributes:
        launcher: torchrun, mindspore, openmpi, pmi, slurm; plain where we start the ranks.
        size: number of ranks that the launcher started; None if plain.
        rank: None if plain, in the scheduler, or where it is handed out at the rendezvous.
        local_rank: rank on this host, if the launcher says it.
        is_scheduler: MindSpore's extra process, which hosts the rendezvous.
        store: "host:port" of the rendezvous, or None where rank 0 opens one.
        job: what tells this job from others on the same host, where rank 0 opens the rendezvous.
        requested_size: MS_WORKER_NUM without MS_ROLE: a wish for so many ranks.
        stray_size: WORLD_SIZE without RANK: a leftover that must not be passed over in silence,
            unless it says what the launcher says.
        start_timeout_s: the launcher's own deadline for the rendezvous, if it says one.
        notes: what the user should know; said on stderr.
    """

    launcher: str = "plain"
    size: int | None = None
    rank: int | None = None
    local_rank: int | None = None
    is_scheduler: bool = False
    store: str | None = None
    job: str = ""
    requested_size: int | None = None
    stray_size: int | None = None
    start_timeout_s: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        return self.launcher == "plain"

    @property
    def announcement(self) -> Path:
        """The file in which rank 0 leaves its port for the others, where nobody names a store."""
        return Path(tempfile.gettempdir()) / f"shardrun-{os.getuid()}-{self.job}.json"


def seen_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter to the choice, as they are set."""
    names = [name for name in environ if name.startswith("MS_") or name in SEEN]
    return {name: environ[name] for name in sorted(names)}


def detect(environ: Mapping[str, str], *, parent_pid: int = 0) -> WorkerEnvironment:
    """Read the process environment.

    Args:
        parent_pid: tells jobs of one host apart where the launcher gives no number.

    Raises:
        LaunchError: half of a launcher's variables, a number that is none, or launchers that
            contradict each other.
    """
    _check_stray_rank(environ)
    found = [item for item in _BY_RANK if _is_rank_of(item, environ)]
    if "MS_ROLE" in environ:
        if TORCHRUN in found:
            raise LaunchError(_contradiction("MS_ROLE and torchrun's RANK", environ))
        environment = replace(_mindspore(environ), notes=_around("mindspore", found))
    elif found:
        _check_hand_set(found, environ)
        environment = _ranked(found[0], found[1:], environ, parent_pid)
    else:
        environment = _plain(environ)
    stray = None if TORCHRUN in found else _positive(environ, "WORLD_SIZE")
    return replace(environment, stray_size=stray)


def decide_size(
    environment: WorkerEnvironment, tp: int | None, prepared: int | None, default: int
) -> tuple[int, tuple[str, ...]]:
    """The number of ranks, and what to say about it.

    Args:
        tp: `parallel.tp`, or None where it is open.
        prepared: the size that a prepared checkpoint was cut for.
        default: where nothing says a size.

    Raises:
        LaunchError: the launcher's size, MS_WORKER_NUM and parallel.tp are not all the same.
    """
    claims = {
        f"{environment.launcher}'s number of ranks": environment.size,
        "MS_WORKER_NUM": environment.requested_size,
        "WORLD_SIZE": environment.stray_size,
        "parallel.tp": tp,
    }
    said = {name: value for name, value in claims.items() if value is not None}
    listed = ", ".join(f"{name}={value}" for name, value in said.items())
    if len(set(said.values())) > 1:
        raise LaunchError(
            f"the number of ranks must be one, but {listed}; unset what is stale or make them "
            "equal."
        )
    if environment.stray_size is not None and environment.is_plain:
        raise LaunchError(
            f"WORLD_SIZE is set without RANK ({listed}); unset it, or launch with torchrun."
        )
    if environment.requested_size is not None and tp is None and environment.is_plain:
        return environment.requested_size, (
            f"MS_WORKER_NUM={environment.requested_size} is set: starting as many ranks "
            "(parallel.tp=… or unset MS_WORKER_NUM for another number)",
        )
    if said:
        return next(iter(said.values())), ()
    if prepared is not None:
        return prepared, (f"the checkpoint was prepared for tp={prepared}: as many ranks start",)
    return default, ()


def _plain(environ: Mapping[str, str]) -> WorkerEnvironment:
    requested = _positive(environ, "MS_WORKER_NUM")
    names = ("RANK_ID", "RANK_SIZE", "DEVICE_ID", "MS_NODE_ID")
    stale = [name for name in names if name in environ]
    notes = (f"{', '.join(stale)} set without MS_ROLE: not used",) if stale else ()
    return WorkerEnvironment(requested_size=requested, notes=notes)


def _mindspore(environ: Mapping[str, str]) -> WorkerEnvironment:
    role = environ["MS_ROLE"]
    if role not in ("MS_WORKER", "MS_SCHED"):
        raise LaunchError(f"MS_ROLE must be MS_WORKER or MS_SCHED, but is {role!r}; unset it.")
    names = ("MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT")
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise LaunchError(
            f"MS_ROLE={role} needs {' and '.join(missing)}; set them alike in every process, or "
            "unset MS_ROLE."
        )
    size = _positive(environ, "MS_WORKER_NUM")
    _check_rank_size(environ, size)
    is_scheduler = role == "MS_SCHED"
    return WorkerEnvironment(
        launcher="mindspore",
        size=size,
        # The scheduler's RANK_ID is 0 too: the role decides, never the rank.
        rank=None if is_scheduler else _mindspore_rank(environ, size),
        local_rank=None if is_scheduler else _integer(environ, "DEVICE_ID"),
        is_scheduler=is_scheduler,
        store=f"{environ['MS_SCHED_HOST']}:{_port(environ, 'MS_SCHED_PORT')}",
        start_timeout_s=_timeout(environ),
    )


def _mindspore_rank(environ: Mapping[str, str], size: int | None) -> int | None:
    """RANK_ID, or an MS_NODE_ID that is a number; None where the rendezvous hands ranks out."""
    text = environ.get("MS_NODE_ID", "")
    node_id = int(text) if text.isdecimal() else None
    rank = _integer(environ, "RANK_ID")
    if None not in (rank, node_id) and rank != node_id:
        raise LaunchError(
            f"RANK_ID and MS_NODE_ID must be one rank, but are {rank} and {text}; unset the stale "
            "one."
        )
    rank = node_id if rank is None else rank
    if rank is not None and size is not None and not 0 <= rank < size:
        raise LaunchError(
            f"RANK_ID must be below MS_WORKER_NUM={size}, but is {rank}; start {size} workers only."
        )
    return rank


def _check_rank_size(environ: Mapping[str, str], size: int | None) -> None:
    rank_size = _positive(environ, "RANK_SIZE")
    if rank_size is not None and rank_size != size:
        raise LaunchError(
            f"RANK_SIZE must be MS_WORKER_NUM={size}, but is {rank_size}; unset the stale one."
        )


def _timeout(environ: Mapping[str, str]) -> float | None:
    value = _integer(environ, "MS_TOPO_TIMEOUT")
    return None if value is None or value < 0 else float(value)


def _ranked(
    launcher: LauncherVariables,
    outer: list[LauncherVariables],
    environ: Mapping[str, str],
    parent_pid: int,
) -> WorkerEnvironment:
    size, rank = _positive(environ, launcher.size), _integer(environ, launcher.rank)
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
    store = _store(launcher, environ, size)
    return WorkerEnvironment(
        launcher=launcher.name,
        size=size,
        rank=rank,
        local_rank=_integer(environ, launcher.local_rank),
        store=store,
        job=_job(launcher, environ, parent_pid if store is None else 0),
        requested_size=_positive(environ, "MS_WORKER_NUM"),
        notes=_around(launcher.name, outer),
    )


def _around(inner: str, outer: list[LauncherVariables]) -> tuple[str, ...]:
    return tuple(f"{item.name} is around {inner}, which decides" for item in outer)


def _store(launcher: LauncherVariables, environ: Mapping[str, str], size: int) -> str | None:
    """Where the rendezvous is; None where one host has all ranks: rank 0 picks a free port."""
    if launcher is TORCHRUN:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if missing:
            raise LaunchError(
                f"RANK and WORLD_SIZE are set, but {' and '.join(missing)} not; "
                "launch with torchrun, or unset RANK and WORLD_SIZE."
            )
        return f"{environ['MASTER_ADDR']}:{_port(environ, 'MASTER_PORT')}"
    if _is_one_host(launcher, environ, size):
        return None
    nodes = environ.get("SLURM_STEP_NODELIST" if launcher is SLURM else "SLURM_JOB_NODELIST", "")
    host = environ.get("MASTER_ADDR") or first_host(nodes)
    given = "MASTER_PORT" in environ
    port = _port(environ, "MASTER_PORT") if given else _slurm_port(launcher, environ)
    if not host or port is None:
        raise LaunchError(
            f"{launcher.name} started {size} ranks on several hosts, and MASTER_ADDR and "
            "MASTER_PORT are not set; export rank 0's host and a free port of it."
        )
    return f"{host}:{port}"


def _is_one_host(launcher: LauncherVariables, environ: Mapping[str, str], size: int) -> bool:
    if launcher is SLURM:
        return environ.get("SLURM_STEP_NUM_NODES", "1") == "1"
    return _positive(environ, launcher.local_size) in (None, size)


def first_host(nodelist: str) -> str:
    """The first name of a Slurm node list: `n[03-05,9],m1` -> `n03`."""
    head, bracket, tail = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.split(",")[0]
    first = tail.replace("]", ",").replace("-", ",").split(",")[0]
    return head + first + tail.partition("]")[2].split(",")[0]


def _slurm_port(launcher: LauncherVariables, environ: Mapping[str, str]) -> int | None:
    """The step's reserved port, or one that neighbouring jobs do not share; None out of Slurm."""
    job, step = _integer(environ, "SLURM_JOB_ID"), 0
    if launcher is SLURM:  # mpirun's ranks see the step of their node's daemon, if any
        reserved = environ.get("SLURM_STEP_RESV_PORTS", "").split("-")[0].split(",")[0]
        if reserved.isdecimal():
            return int(reserved)
        step = _integer(environ, "SLURM_STEP_ID") or 0
    return None if job is None else 20000 + (job * 97 + step) % 12000


def _job(launcher: LauncherVariables, environ: Mapping[str, str], parent_pid: int) -> str:
    """The same on all ranks of a job, and only there."""
    if launcher is SLURM:
        return f"slurm-{environ.get('SLURM_JOB_ID')}-{environ.get('SLURM_STEP_ID')}"
    if launcher is TORCHRUN:
        # Its store outlives a restart of the ranks, who must not meet those of the round before.
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        return "-".join(["torchrun", *(environ.get(name, "0") for name in names)])
    if "PMIX_NAMESPACE" in environ:
        return f"{launcher.name}-{environ['PMIX_NAMESPACE'].replace('/', '-')}"
    return f"{launcher.name}-{parent_pid}"


def launching_pid(environ: Mapping[str, str]) -> int:
    """The nearest ancestor that is no rank: mpirun's daemon, the same for all ranks of a host.

    A wrapper script between the two was given the same rank.
    """
    names = [item.rank for item in _BY_RANK if item.rank in environ]
    marks = [f"{name}={environ[name]}".encode() for name in names]
    pid = os.getppid()
    while marks and pid > 1 and set(marks) <= set(_ancestor(pid, "environ").split(b"\0")):
        pid = int(_ancestor(pid, "stat").rpartition(b")")[2].split()[1])
    return pid


def _ancestor(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _is_rank_of(launcher: LauncherVariables, environ: Mapping[str, str]) -> bool:
    if launcher.rank not in environ or launcher.size not in environ:
        return False
    if launcher is SLURM:
        step = environ.get("SLURM_STEP_ID", "")
        return step.isdigit() and int(step) < _FIRST_SPECIAL_STEP
    return True


def _check_stray_rank(environ: Mapping[str, str]) -> None:
    """A RANK without WORLD_SIZE is a leftover that would silently mean nothing."""
    if "RANK" in environ and "WORLD_SIZE" not in environ:
        raise LaunchError(
            f"RANK={environ['RANK']} is set without WORLD_SIZE; unset RANK, or launch with "
            "torchrun."
        )


def _check_hand_set(found: list[LauncherVariables], environ: Mapping[str, str]) -> None:
    """RANK and WORLD_SIZE that no torchrun set are a script's, and must be its launcher's."""
    if found[0] is not TORCHRUN or "TORCHELASTIC_RUN_ID" in environ:
        return
    outer = [item for item in found[1:] if environ[item.size] != "1"]
    for names in ("rank", "size"):
        if any(
            environ[getattr(item, names)] != environ[getattr(TORCHRUN, names)] for item in outer
        ):
            raise LaunchError(_contradiction(f"two launchers' {names}s", environ))


def _contradiction(what: str, environ: Mapping[str, str]) -> str:
    listed = ", ".join(f"{name}={value}" for name, value in seen_variables(environ).items())
    return f"{what} contradict each other ({listed}); unset the stale ones."


def _integer(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name)
    if value is None or value == "":
        return None
    try:
        return int(value)
    except ValueError:
        raise LaunchError(f"{name} must be an integer, but is {value!r}; unset it.") from None


def _positive(environ: Mapping[str, str], name: str) -> int | None:
    value = _integer(environ, name)
    if value is not None and value < 1:
        raise LaunchError(f"{name} must be at least 1, but is {value}; unset it.")
    return value


def _port(environ: Mapping[str, str], name: str) -> int:
    value = _integer(environ, name)
    if value is None or not 0 < value < 65536:
        raise LaunchError(f"{name} must be a port from 1 to 65535, but is {environ[name]!r}.")
    return value
