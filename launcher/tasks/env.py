"""env: what this process sees, and what would be decided from it."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path

from launcher.environment import WorkerEnvironment, decide_size, seen_variables
from launcher.resolve import DEMO_TP
from launcher.schema import Config


def run(config: Config, environment: WorkerEnvironment) -> None:
    """Print the launcher, its variables, the devices, the kernels and the number of ranks.

    Raises:
        LaunchError: the number of ranks is claimed twice, and not the same.
    """
    default = DEMO_TP if config.checkpoint is None else 1
    size, notes = decide_size(environment, config.parallel.tp, None, default)
    lines = {
        "launcher": environment.launcher,
        "role": "scheduler" if environment.is_scheduler else "worker",
        "rank": "handed out at the rendezvous" if _is_open(environment) else environment.rank,
        "ranks": size,
        "rendezvous": environment.store or "rank 0 opens one on a free port",
        "host": socket.gethostname(),
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "shared memory": _shared_memory(),
        **_libraries(),
        **{f"${name}": value for name, value in seen_variables(os.environ).items()},
    }
    for name, value in lines.items():
        print(f"{name:16} {value}")
    for note in notes:
        print(f"{'note':16} {note}")


def _is_open(environment: WorkerEnvironment) -> bool:
    return environment.rank is None and not environment.is_scheduler and not environment.is_plain


def _shared_memory() -> str:
    if not Path("/dev/shm").exists():
        return "no /dev/shm"
    usage = os.statvfs("/dev/shm")
    return f"{usage.f_bavail * usage.f_frsize / 1e9:.1f} GB free in /dev/shm"


def _libraries() -> dict[str, str]:
    import torch

    from launcher.collectives import in_words

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "native bfloat16": "yes" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no",
        "GPUs": ", ".join(gpus) or "none",
        "int8 kernel": "reference (blockwise float32)",
        "collectives": in_words(),
    }
