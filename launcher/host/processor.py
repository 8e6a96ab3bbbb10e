"""What this processor can, as far as it decides how weights lie in memory. Does not import torch."""

from __future__ import annotations

import platform
from pathlib import Path

_AVX2 = frozenset({"avx2", "fma"})
_AVX512_VNNI = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vnni"})


def takes_quads() -> bool:
    """Whether the C kernel multiplies int8 activations four bytes at a time here.

    quant/kernels/native/int8_sets.h decides it: where one instruction does that, and in the portable
    set. AVX2 alone takes pairs of 16 bits.
    """
    flags = _flags()
    if platform.machine() != "x86_64" or not flags >= _AVX2:
        return True
    return "avx_vnni" in flags or flags >= _AVX512_VNNI


def _flags() -> frozenset[str]:
    """The instruction sets of the first core, by Linux's names."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":") for line in lines)
    return next(
        (frozenset(said.split()) for name, _, said in named if name.strip() == "flags"), frozenset()
    )
