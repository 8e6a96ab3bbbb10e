"""Place: where a process of the job runs, in terms that outlive it: a pid may be used again."""

from __future__ import annotations

import os
import signal
import socket
from functools import cache
from pathlib import Path
from typing import Any

from launcher.host.topology import allowed_cpus

# Where a rank runs: host, machine, pid, the start time of the process, and the cores it may use.
Place = dict[str, Any]


def place_of_process() -> Place:
    """Where this process runs."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "cores": sorted(allowed_cpus()),
    }


def is_here(place: Place) -> bool:
    """Whether a place is on this machine, where its pid means something and loopback leads."""
    return bool(place["machine"] == _machine())


def is_running(place: Place) -> bool:
    """Whether the process of a place on this machine still runs."""
    return process_start(place["pid"]) == place["started"]


def end_stuck(place: Place) -> None:
    """Kill a process of this machine that no longer even beats: it would stay for ever."""
    if is_here(place) and is_running(place):
        os.kill(place["pid"], signal.SIGKILL)


def process_start(pid: int) -> int:
    """The start time of a living process in clock ticks; 0 if it is gone or a zombie."""
    fields = _stat(pid)
    return 0 if not fields or fields[0] in "ZX" else int(fields[19])


def is_stopped(pid: int) -> bool:
    """Whether a signal stopped the process; one that a debugger holds is not meant."""
    return _stat(pid)[:1] == ["T"]


def _stat(pid: int) -> list[str]:
    """The fields of the kernel's line on a process from its state on; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@cache
def _machine() -> str:
    """One kernel, one set of pids, one network: containers may share a host's name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return " ".join([boot, *(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net"))])
    except OSError:
        return socket.gethostname()
