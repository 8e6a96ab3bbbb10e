"""Recording the C calls of a decode step, to make them again in one call: a CUDA graph for CPUs.

While a recording is entered, a step runs as always and its calls of C are noted. What is noted is all
there is to do only if torch did nothing else than allocate and view; so every operation of torch passes
here, and the first one that computes spoils the recording. The buffers that torch allocates belong to
the program from then on.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALLOCATIONS = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default)
_local = threading.local()
# The library's shardrun_run.
RunCalls = Callable[[Any, int, int, Any], int]


class Waiting(Protocol):
    """A call that may return before it is done, because other ranks are not there yet."""

    def wait(self) -> None:
        """Return once it is worth making again."""
        ...

    def done(self) -> None:
        """Called after each time it was made."""
        ...


class _Call(ctypes.Structure):
    _fields_ = (("function", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


@dataclass(frozen=True)
class Program:
    """Recorded calls.

    Attributes:
        run_calls: the library's function that makes them.
        calls, arguments: in their order.
        waiting: those that may return early, by their place.
        effects: what else the step did, once for each run.
        buffers: what the calls write, kept for as long as the program.
    """

    run_calls: RunCalls
    calls: ctypes.Array[_Call]
    arguments: Sequence[ctypes.Structure]
    waiting: dict[int, Waiting]
    effects: Sequence[Callable[[], None]]
    buffers: Sequence[Tensor]

    def run(self, seconds: ctypes.Array[ctypes.c_double] | None = None) -> None:
        """Make all calls.

        Args:
            seconds: what each call took is added to it.
        """
        first, count = 0, len(self.calls)
        while (reached := self.run_calls(self.calls, first, count, seconds)) < count:
            self._note_done(range(first, reached))
            self.waiting[reached].wait()
            first = reached
        self._note_done(range(first, count))
        for effect in self.effects:
            effect()

    def _note_done(self, places: range) -> None:
        for place, call in self.waiting.items():
            if place in places:
                call.done()


class _Notes:
    """What a recording notes, and how it looks at each operation of torch.

    `__torch_dispatch__` stands in a class of its own: where a subclass of TorchDispatchMode defines it,
    torch wraps it for torch.compile, and the first call imports torch._dynamo and sympy, for a second.

    Attributes:
        spoiled: the first operation that a program would leave out, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spoiled: str | None = None
        self._calls: list[tuple[Any, ctypes.Structure]] = []
        self._waiting: dict[int, Waiting] = {}
        self._effects: list[Callable[[], None]] = []
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._layer = self._place = 0

    @property
    def num_calls(self) -> int:
        return len(self._calls)

    def next_layer(self) -> None:
        self._layer, self._place = 1 - self._layer, 0

    def add(
        self, function: Any, arguments: ctypes.Structure, waiting: Waiting | None = None
    ) -> None:
        """Note a call that was made; the struct must stay as it is."""
        if waiting is not None:
            self._waiting[len(self._calls)] = waiting
        self._calls.append((function, arguments))

    def after(self, effect: Callable[[], None]) -> None:
        """Note something that every run of the program must do besides its calls."""
        self._effects.append(effect)

    def spoil(self, reason: str) -> None:
        self.spoiled = self.spoiled or reason

    def program(self, run_calls: RunCalls) -> Program:
        assert self.spoiled is None, self.spoiled
        calls = (_Call * len(self._calls))()
        for place, (function, arguments) in enumerate(self._calls):
            calls[place].function = ctypes.cast(function, ctypes.c_void_p)
            calls[place].arguments = ctypes.addressof(arguments)
        kept = [arguments for _, arguments in self._calls]
        buffers = list(self._buffers.values())
        return Program(run_calls, calls, kept, self._waiting, self._effects, buffers)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _ALLOCATIONS:
            return self._reused(result)
        if function._schema.is_mutable or not _is_view(result, args):
            self.spoil(str(function))
        return result

    def _reused(self, fresh: Tensor) -> Tensor:
        self._place += 1
        key = (self._layer, self._place, fresh.shape, fresh.dtype)
        return self._buffers.setdefault(key, fresh)


class Recording(_Notes, TorchDispatchMode):
    """Enter it around the step; `next_layer` before each layer.

    A layer's buffers are used again by the layer after the next: only what a layer returns is read
    in the next one.
    """

    def __enter__(self) -> Recording:
        _local.recording = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _local.recording = None
        super().__exit__(*error)


def active() -> Recording | None:
    """This thread's recording, if it is in one."""
    return getattr(_local, "recording", None)


def _is_view(result: Any, args: Any) -> bool:
    """Whether an operation only looked at its arguments in another way."""
    given = {_storage(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
    found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return bool(found) and all(_storage(tensor) in given for tensor in found)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
