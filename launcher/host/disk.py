"""How fast a disk reads and writes: a short stretch each, past the page cache."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

_MOST_BYTES = 256 << 20
_BLOCK_BYTES = 8 << 20
_WRITTEN_BYTES = 64 << 20
# A slow disk tells its speed in less than all that.
_MOST_SECONDS = 0.4


def measure_read_gb_s(path: Path) -> float | None:
    """Sequential read speed of a file's disk in GB/s; None where it cannot be read.

    A stretch in the middle is dropped from the page cache first: that of the file alone, and only what
    is read here. A file that others read from at the moment may still give the cache's speed.
    """
    block = memoryview(mmap.mmap(-1, _BLOCK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            num_bytes = min(_MOST_BYTES, size)
            start = (size - num_bytes) // 2 // mmap.PAGESIZE * mmap.PAGESIZE
            os.posix_fadvise(file.fileno(), start, num_bytes, os.POSIX_FADV_DONTNEED)
            return _timed_read(file.fileno(), block, start, num_bytes)
    except OSError:
        return None


def _timed_read(fd: int, block: memoryview, start: int, num_bytes: int) -> float | None:
    done, began = 0, time.perf_counter()
    while done < num_bytes and time.perf_counter() - began < _MOST_SECONDS:
        moved = os.preadv(fd, [block[: num_bytes - done]], start + done)
        if moved == 0:
            break
        done += moved
    return done / (time.perf_counter() - began) / 1e9 if done else None


def measure_write_gb_s(directory: Path) -> float | None:
    """Write speed in GB/s, flushed to the disk; None where it cannot be asked.

    The file has no name, so nothing can be left behind.
    """
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except OSError:
        return None
    block = os.urandom(1 << 20) * (_WRITTEN_BYTES >> 20)
    began = time.perf_counter()
    try:
        done = os.pwrite(fd, block, 0)
        os.fsync(fd)
    except OSError:
        return None
    finally:
        os.close(fd)
    return done / (time.perf_counter() - began) / 1e9
