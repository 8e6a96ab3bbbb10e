"""env: what this process sees, and what would be decided from it."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path

from launcher.environment.detection import seen_variables
from launcher.environment.size import decide_size
from launcher.environment.worker import WorkerEnvironment
from launcher.failures import ConfigError
from launcher.host.cores import divide
from launcher.host.kernel_survey import survey
from launcher.host.kernels import fastest
from launcher.host.topology import Topology, allowed_cpus, format_cpus, read_topology
from launcher.host.wishes import read_wishes
from launcher.resolve import DEMO_TP
from launcher.schema import Config

_LABELS = ("w8a16", "w8a8", "w4a16", "w4a16 g128")


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
        **_cores(config, environment, size),
        "shared memory": _shared_memory(),
        **_libraries(),
        **_kernels(),
        **{f"${name}": value for name, value in seen_variables(os.environ).items()},
    }
    for name, value in lines.items():
        print(f"{name:16} {value}")
    for note in notes:
        print(f"{'note':16} {note}")


def _is_open(environment: WorkerEnvironment) -> bool:
    return environment.rank is None and not environment.is_scheduler and not environment.is_plain


def _cores(config: Config, environment: WorkerEnvironment, size: int) -> dict[str, str]:
    """The cores, what limits them, and how ranks that we start would divide them."""
    cpus = allowed_cpus()
    topology = read_topology(cpus)
    wishes = read_wishes(config.parallel.threads, config.parallel.pin, os.environ)
    if environment.is_plain:
        seats = divide(topology, [cpus] * size, wishes)
        division = {f"rank {rank}": str(seat) for rank, seat in enumerate(seats)}
    else:
        division = {"division": "ranks of a host that may use the same cores divide them"}
    return {
        "cores": f"{format_cpus(cpus)}: {len(topology.physical_cores(cpus))} physical ones, "
        f"{len(cpus)} threads, of this host's {os.cpu_count()}",
        "NUMA nodes": _nodes(topology, cpus),
        "cpu quota": "none" if topology.quota is None else f"{topology.quota:g} cores' time",
        **division,
        **({"threads": wishes.note} if wishes.note else {}),
    }


def _nodes(topology: Topology, cpus: frozenset[int]) -> str:
    """`0: 0-3, 1: 4-7`, of the CPUs that may be used."""
    nodes = {
        node: [cpu for cpu in cpus if topology.nodes_of([cpu]) == [node]]
        for node in topology.nodes_of(cpus)
    }
    return ", ".join(f"{node}: {format_cpus(own)}" for node, own in nodes.items())


def _shared_memory() -> str:
    if not Path("/dev/shm").exists():
        return "no /dev/shm"
    usage = os.statvfs("/dev/shm")
    return f"{usage.f_bavail * usage.f_frsize / 1e9:.1f} GB free in /dev/shm"


def _kernels() -> dict[str, str]:
    """Which products with quantized weights work here, their speed, and which `kernel=auto` takes."""
    try:
        found = survey()
    except ConfigError as error:
        return {"int8 kernel": str(error)}
    chosen = ", ".join(f"{fastest(found, label)} for {label}" for label in _LABELS)
    size = found["shape"][0] * found["shape"][1]
    lines = {"int8 kernel": f"{chosen} (kernel=auto; all give the same bits)"}
    for name, entry in found["kernels"].items():
        detail = f"{entry['detail']}; " if entry["detail"] else ""
        speeds = detail + "; ".join(
            f"{scheme} {_speeds(ms, size, 1)}" for scheme, ms in entry["ms"].items()
        )
        lines[f"  {name}"] = entry["problem"] or speeds or "works everywhere, slowly"
    for dtype, ms in found["unquantized"].items():
        lines[f"  {dtype}"] = f"not quantized; {_speeds(ms, size, 4 if dtype == 'float32' else 2)}"
    return lines


def _speeds(ms: dict[str, float], num_weights: int, num_bytes: int) -> str:
    """Of one row, whose limit is reading, and of many, whose limit is computing."""
    read = num_weights * num_bytes / ms["1"] / 1e6
    computed = 2 * 128 * num_weights / ms["128"] / 1e9
    return f"{read:.0f} GB/s at 1 row, {computed:.2f} TOP/s at 128"


def _libraries() -> dict[str, str]:
    import torch

    from launcher.ranks.collectives import in_words

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "native bfloat16": "yes" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no",
        "GPUs": ", ".join(gpus) or "none",
        "collectives": in_words(),
    }
