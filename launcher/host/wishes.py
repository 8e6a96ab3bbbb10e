"""Wishes: what the user, or the launcher in the user's name, said of threads and cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from launcher.environment.ancestry import launching_pid, was_set_by

# With these OpenMP binds its threads itself.
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_UNBOUND = ("", "false", "none", "disabled")
_TORCHRUNS_OWN = (
    "torchrun set OMP_NUM_THREADS=1 by itself: not used, the ranks divide the cores "
    "(parallel.threads=1 keeps it)"
)


@dataclass(frozen=True)
class Wishes:
    """What was said, in configuration or environment.

    Attributes:
        threads: of each rank; None divides the cores.
        floating: why ranks are not bound to cores; empty where they are.
        openmp_binds: variables tell OpenMP to bind its threads itself.
        note: what the user should know.
    """

    threads: int | None = None
    floating: str = ""
    openmp_binds: bool = False
    note: str = ""


def torchrun_set_threads(environ: Mapping[str, str]) -> bool:
    """Whether OMP_NUM_THREADS=1 is torchrun's own: where the user set none, it sets 1 for all."""
    is_under_torchrun = "TORCHELASTIC_RUN_ID" in environ
    return is_under_torchrun and was_set_by(launching_pid(environ), "OMP_NUM_THREADS")


def read_wishes(
    threads: int | None,
    pin: bool,
    environ: Mapping[str, str],
    is_torchruns: Callable[[Mapping[str, str]], bool] = torchrun_set_threads,
) -> Wishes:
    """Wishes of the configuration first, then those of the environment.

    Args:
        is_torchruns: whether torchrun, not the user, set OMP_NUM_THREADS.
    """
    bound = [name for name in _BINDING if environ.get(name, "").lower() not in _UNBOUND]
    floating = f"{bound[0]} is set" if bound else "" if pin else "parallel.pin is false"
    if not hasattr(os, "sched_setaffinity"):
        floating = "this system binds no process to cores"
    wishes = Wishes(threads, floating, openmp_binds=bool(bound))
    first = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if threads is not None or not first.isdecimal() or int(first) < 1:
        return wishes
    if first == "1" and is_torchruns(environ):
        return replace(wishes, note=_TORCHRUNS_OWN)
    return replace(wishes, threads=int(first))
