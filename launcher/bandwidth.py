"""How fast this host's cores read memory: the ceiling that decode speed is held against."""

from __future__ import annotations

import time

_NUM_BYTES = 1 << 28
_REPEATS = 5


def measure_bandwidth_gb_s() -> float:
    """Read bandwidth of all cores together in GB/s: the best of a few sums over 256 MiB."""
    import torch

    data = torch.ones(_NUM_BYTES // 4, dtype=torch.float32)
    data.sum()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return _NUM_BYTES / min(times) / 1e9
