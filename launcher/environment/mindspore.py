"""MindSpore's `MS_*`, set by msrun or by hand: workers, and a scheduler that hosts the rendezvous."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.environment.variables import integer, port, positive
from launcher.environment.worker import WorkerEnvironment
from launcher.failures import LaunchError

NAME = "mindspore"


def read_environment(environ: Mapping[str, str]) -> WorkerEnvironment:
    """What a process with MS_ROLE is."""
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
    size = positive(environ, "MS_WORKER_NUM")
    _check_rank_size(environ, size)
    is_scheduler = role == "MS_SCHED"
    return WorkerEnvironment(
        launcher=NAME,
        size=size,
        # The scheduler's RANK_ID is 0 too: the role decides, never the rank.
        rank=None if is_scheduler else _rank(environ, size),
        local_rank=None if is_scheduler else integer(environ, "DEVICE_ID"),
        is_scheduler=is_scheduler,
        store=f"{environ['MS_SCHED_HOST']}:{port(environ, 'MS_SCHED_PORT')}",
        start_timeout_s=_timeout(environ),
    )


def _rank(environ: Mapping[str, str], size: int | None) -> int | None:
    """RANK_ID, or an MS_NODE_ID that is a number; None where the rendezvous hands ranks out."""
    text = environ.get("MS_NODE_ID", "")
    node_id = int(text) if text.isdecimal() else None
    rank = integer(environ, "RANK_ID")
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
    rank_size = positive(environ, "RANK_SIZE")
    if rank_size is not None and rank_size != size:
        raise LaunchError(
            f"RANK_SIZE must be MS_WORKER_NUM={size}, but is {rank_size}; unset the stale one."
        )


def _timeout(environ: Mapping[str, str]) -> float | None:
    value = integer(environ, "MS_TOPO_TIMEOUT")
    return None if value is None or value < 0 else float(value)
