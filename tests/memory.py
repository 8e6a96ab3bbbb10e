"""The anonymous memory of this process while it works; for scripts that run in one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def peak_kib(script: str, folder: Path, layers: int) -> int:
    """What a script prints last, in a process of its own, of a model of so many layers.

    Args:
        script: takes a directory of its own, which is made in `folder`, and the number of layers.
    """
    own = folder / str(layers)
    own.mkdir()
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", script, str(own), str(layers)]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def anonymous_bytes() -> int:
    """Bytes that are no page of a file: mapped checkpoints do not count."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def watch_memory(work: Callable[[], T]) -> tuple[T, int, int]:
    """What work() returns, and the anonymous bytes at most, and at the end, above those before."""
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = work()
    finally:
        done.set()
        thread.join()
    return result, peak - before, anonymous_bytes() - before
