"""The small all-reduce in C, where there was a C compiler at installation: all_reduce.c."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from quant.compiled import find_compiled

# As in all_reduce.c; what is not here is added up by torch.
KINDS = {
    (torch.float32, "sum"): 0,
    (torch.float32, "max"): 1,
    (torch.int32, "sum"): 2,
    (torch.int64, "sum"): 3,
}
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class CompiledAllReduce:
    """One rank's calls.

    Args:
        cells: address of the ranks' numbers, `cell_bytes` apart.
        slots: for each half, the address of each rank's slot.
        spin_s, yield_s: as in Patience.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        rank: int,
        cells: int,
        cell_bytes: int,
        slots: Sequence[Sequence[int]],
        spin_s: float,
        yield_s: float,
    ) -> None:
        self._library = library
        self._rank, self._size = rank, len(slots[0])
        self._cells, self._cell_bytes = cells, cell_bytes
        self._slots = [(_POINTER * self._size)(*addresses) for addresses in slots]
        self._spin_s, self._yield_s = spin_s, yield_s

    def meet(self, x: Tensor, op: str, turn: int) -> bool:
        """Lay x down for this turn and add up, if the others come soon; whether they did."""
        done: int = self._library.shardrun_all_reduce(
            self._cells, self._cell_bytes, self._rank, self._size, turn, x.data_ptr(),
            self._slots[turn % 2], x.nbytes, x.numel(), KINDS[x.dtype, op], self._spin_s,
            self._yield_s,
        )  # fmt: skip
        return done == 1

    def add_up(self, x: Tensor, op: str, turn: int) -> None:
        """What `meet` left out, once all others have reached the turn."""
        self._library.shardrun_add_up(
            x.data_ptr(), self._slots[turn % 2], self._size, x.numel(), KINDS[x.dtype, op]
        )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where there is none."""
    path = find_compiled(Path(__file__).parent, "_all_reduce")
    if path is None:
        return None
    try:
        found = ctypes.CDLL(str(path))
    except OSError:
        return None
    found.shardrun_all_reduce.restype = _INT
    found.shardrun_all_reduce.argtypes = [
        _POINTER, _SIZE, _SIZE, _SIZE, ctypes.c_uint64, _POINTER, _POINTER, _SIZE, _SIZE, _INT,
        ctypes.c_double, ctypes.c_double,
    ]  # fmt: skip
    found.shardrun_add_up.restype = None
    found.shardrun_add_up.argtypes = [_POINTER, _POINTER, _SIZE, _SIZE, _INT]
    return found
