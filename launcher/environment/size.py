"""How many ranks a job has: what the launcher, the variables and the configuration say, as one."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.environment.worker import WorkerEnvironment
from launcher.failures import LaunchError


def check_sizes(environment: WorkerEnvironment, tp: int | None) -> dict[str, int]:
    """Whoever says a number of ranks, and which.

    Args:
        tp: `parallel.tp`, or None where it is open.

    Raises:
        LaunchError: they do not say the same.
    """
    claims = {
        f"{environment.launcher}'s number of ranks": environment.size,
        "MS_WORKER_NUM": environment.requested_size,
        "WORLD_SIZE": environment.stray_size,
        "parallel.tp": tp,
    }
    said = {name: value for name, value in claims.items() if value is not None}
    if len(set(said.values())) > 1:
        raise LaunchError(
            f"the number of ranks must be one, but {_listed(said)}; unset what is stale or make them "
            "equal."
        )
    return said


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
    said = check_sizes(environment, tp)
    if environment.stray_size is not None and environment.is_plain:
        raise LaunchError(
            f"WORLD_SIZE is set without RANK ({_listed(said)}); unset it, or launch with torchrun."
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


def _listed(said: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in said.items())
