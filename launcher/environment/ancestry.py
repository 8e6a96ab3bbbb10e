"""What the processes above this one were started with, as far as /proc tells."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from launcher.environment.detection import LAUNCHERS


def launching_pid(environ: Mapping[str, str]) -> int:
    """The nearest ancestor that is no rank: mpirun's daemon, the same for all ranks of a host.

    A wrapper script between the two was given the same rank.
    """
    names = [item.rank for item in LAUNCHERS if item.rank in environ]
    marks = [f"{name}={environ[name]}".encode() for name in names]
    pid = os.getppid()
    while marks and pid > 1 and set(marks) <= set(_ancestor(pid, "environ").split(b"\0")):
        pid = int(_ancestor(pid, "stat").rpartition(b")")[2].split()[1])
    return pid


def was_set_by(pid: int, name: str) -> bool:
    """Whether a process that passes a variable on was itself started without it: it set it."""
    entries = _ancestor(pid, "environ").split(b"\0")
    return bool(entries[0]) and not any(entry.startswith(f"{name}=".encode()) for entry in entries)


def _ancestor(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
