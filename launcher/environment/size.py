"""How many ranks a job has: what the launcher, the variables and the configuration say, as one."""

from __future__ import annotations

from launcher.environment.worker import WorkerEnvironment
from launcher.failures import LaunchError


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
