"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes

# glibc's M_MMAP_THRESHOLD, and what it is set to: the blocks of rows that a thread works on are more.
_MMAP_THRESHOLD, _LEAST_MAPPED_BYTES = -3, 4 << 20


def return_freed_blocks() -> None:
    """From now on this process returns a large block to the system as soon as it is freed.

    By itself glibc begins to keep such blocks once it has seen a few freed; between the small ones
    that stay, what it keeps grows to more than a decoder layer.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _LEAST_MAPPED_BYTES)
