"""How many GPUs this host shows to torch, asked of the driver: torch itself takes a second."""

from __future__ import annotations

import ctypes
from pathlib import Path


def count_gpus() -> int | None:
    """The GPUs that `device=cuda` can use, with CUDA_VISIBLE_DEVICES obeyed; None if unknown."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        # ROCm's torch calls its devices cuda as well, and its driver is not asked here.
        return None if Path("/dev/kfd").exists() else 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value
