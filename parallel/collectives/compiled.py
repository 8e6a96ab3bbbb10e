"""The small all-reduce in C, where there was a C compiler at installation: all_reduce.c."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from quant.compiled import find_compiled
from quant.kernels.native.recording import active

# As in all_reduce.c; what is not here is added up by torch.
KINDS = {
    (torch.float32, "sum"): 0,
    (torch.float32, "max"): 1,
    (torch.int32, "sum"): 2,
    (torch.int64, "sum"): 3,
}
_POINTER, _SIZE, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Progress(ctypes.Structure):
    """How far a group has come, for its calls in Python and in C.

    Attributes:
        turn: the last turn that this rank has begun.
        all_reached: a turn that all ranks are known to have reached.
        stage: where in its turn a call in C has stopped to wait.
    """

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("turn", "all_reached", "stage"))
    turn: int
    all_reached: int
    stage: int

    @property
    def awaited(self) -> int:
        """The turn that a stopped call wants all ranks to reach; before it writes, the last one."""
        return self.turn - (self.stage == 1)


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("progress", _POINTER), ("cells", _POINTER), ("cell_bytes", _SIZE), ("rank", _SIZE),
        ("size", _SIZE), ("x", _POINTER), ("slots", _POINTER), ("num_bytes", _SIZE),
        ("count", _SIZE), ("kind", _SIZE), ("spin_s", _DOUBLE), ("yield_s", _DOUBLE),
        ("started", _DOUBLE), ("seconds", _DOUBLE),
    )  # fmt: skip


class CompiledAllReduce:
    """One rank's calls.

    Args:
        cells: address of the ranks' numbers, `cell_bytes` apart.
        slots: the address of each rank's slot, of the first half and then of the second.
        spin_s, yield_s: as in Patience.
        wait: returns once all have reached the awaited turn.
        begin, note: called as a program's call begins, and with its seconds when it is done.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        rank: int,
        progress: Progress,
        cells: int,
        cell_bytes: int,
        slots: Sequence[int],
        spin_s: float,
        yield_s: float,
        wait: Callable[[], None],
        begin: Callable[[], None],
        note: Callable[[float], None],
    ) -> None:
        self._function = library.shardrun_all_reduce
        self._progress = progress
        self._slots = (_POINTER * len(slots))(*slots)
        self._ranks = (cells, cell_bytes, rank, len(slots) // 2)
        self._patience = (spin_s, yield_s)
        self._wait, self._begin, self._note = wait, begin, note

    def __call__(self, x: Tensor, op: str) -> None:
        """The sum over the ranks, in place; a recording notes it."""
        arguments = _Arguments(
            ctypes.addressof(self._progress), *self._ranks, x.data_ptr(),
            ctypes.addressof(self._slots), x.nbytes, x.numel(), KINDS[x.dtype, op], *self._patience,
        )  # fmt: skip
        while self._function(ctypes.byref(arguments)):
            self._wait()
        if (recording := active()) is not None:
            call = _Recorded(arguments, self._wait, self._begin, self._note)
            recording.add(self._function, arguments, call)


@dataclass
class _Recorded:
    """A call of a program, as quant.kernels.native.recording.Waiting."""

    arguments: _Arguments
    wait_for_all: Callable[[], None]
    begin: Callable[[], None]
    note: Callable[[float], None]
    has_begun: bool = False

    def wait(self) -> None:
        self._count()
        self.wait_for_all()

    def done(self) -> None:
        self._count()
        self.has_begun = False
        self.note(self.arguments.seconds)

    def _count(self) -> None:
        """Once a call, and before it waits: others tell from the counts who is behind."""
        if not self.has_begun:
            self.begin()
        self.has_begun = True


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where there is none."""
    path = find_compiled(Path(__file__).parent, "_all_reduce")
    if path is None:
        return None
    try:
        found: Any = ctypes.CDLL(str(path))
    except OSError:
        return None
    found.shardrun_all_reduce.argtypes = [_POINTER]
    return cast(ctypes.CDLL, found)
