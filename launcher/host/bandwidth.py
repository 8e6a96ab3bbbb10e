"""How fast this host's cores read memory: the ceiling that decode speed is held against."""

from __future__ import annotations

import ctypes
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from parallel.group import Group

_NUM_BYTES = 1 << 28
_REPEATS = 5
# Of all ranks together: long enough that the moment at which each leaves the barrier is nothing.
_GROUP_BYTES = 1 << 29
_PASSES = 2
_GROUP_REPEATS = 3
_CACHES = 4


def measure_bandwidth_gb_s() -> float:
    """Read bandwidth of all cores together in GB/s: the best of a few searches through 256 MiB.

    Each core looks, with the C library's `memchr`, for a byte that is not in its part. Needs no torch,
    whose import takes longer than the measurement.
    """
    library = ctypes.CDLL(None)
    library.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    num_cores = len(os.sched_getaffinity(0))
    part = _NUM_BYTES // num_cores
    data = (ctypes.c_char * _NUM_BYTES)()
    parts = [ctypes.addressof(data) + core * part for core in range(num_cores)]
    with ThreadPoolExecutor(num_cores) as pool:
        # Pages that nobody has written are one page of zeros, which the cache holds.
        list(pool.map(lambda start: ctypes.memset(start, 1, part), parts))
        times = []
        for _ in range(_REPEATS):
            began = time.perf_counter()
            list(pool.map(lambda start: library.memchr(start, 0, part), parts))
            times.append(time.perf_counter() - began)
    return part * num_cores / min(times) / 1e9


def measure_group_bandwidth(group: Group, device: torch.device) -> list[float]:
    """Read bandwidth of all ranks at once, in bytes/s: a few measurements, on rank 0; [] elsewhere.

    Each rank sums a part, with its own threads, of a buffer that is several times the caches; the
    bytes of all are divided by the time of the slowest.
    """
    import torch

    num_bytes = max(_GROUP_BYTES, _CACHES * cache_bytes()) // group.size
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    data.sum().item()
    found = []
    for _ in range(_GROUP_REPEATS):
        group.barrier()
        start = time.perf_counter()
        for _ in range(_PASSES):
            data.sum().item()
        mine = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=device)
        parts = group.gather(mine)
        if parts is not None:
            found.append(_PASSES * data.nbytes * group.size / max(float(part) for part in parts))
    return found


def cache_bytes() -> int:
    """Bytes of all last-level caches of this host; 0 where the system does not say."""
    found = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        try:
            size = (cache / "size").read_text().strip()
            found[(cache / "shared_cpu_list").read_text()] = int(size.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return sum(found.values())
