"""The names that the pickle of a state dict may hold, and the record that each stands for.

Nothing here is torch's: a storage's class is the name of its dtype, and a function is one that describes
a tensor from the arguments that torch's own would build it of (torch/_utils.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class PickledStorage:
    """Where a tensor's bytes are: the entry `data/<key>`, of so many numbers of a dtype."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as the pickle describes it; offset and strides are in entries, all of them above -1."""

    storage: PickledStorage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class StorageClass:
    """A storage's class, which is named but never imported."""

    dtype: str


@dataclass(frozen=True)
class Function:
    """A function that is named but never called; `describe` raises ValueError for other arguments."""

    describe: Callable[[tuple[Any, ...]], object]


def _new_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise ValueError("an OrderedDict made from another object")
    return {}


def _tensor(arguments: tuple[Any, ...]) -> PickledTensor:
    """_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata)."""
    match arguments:
        case (PickledStorage() as storage, int(offset), tuple(shape), tuple(strides), *rest):
            if len(rest) > 3 or any(value for value in rest[1:]):
                raise ValueError("a tensor with hooks, or one that is conjugate or negative")
        case _:
            raise ValueError("a tensor made of other arguments")
    if not len(shape) == len(strides) <= _MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions and {len(strides)} strides")
    if not all(type(value) is int and value >= 0 for value in (offset, *shape, *strides)):
        raise ValueError("a tensor whose offset, sizes or strides are no integers of at least 0")
    return PickledTensor(storage, offset, shape, strides)


def _parameter(arguments: tuple[Any, ...]) -> PickledTensor:
    """_rebuild_parameter(tensor, requires_grad, hooks), perhaps with attributes."""
    match arguments:
        case (PickledTensor() as tensor, bool(), {**hooks}, *_) if not hooks:
            return tensor
    raise ValueError("a parameter with hooks")


_STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64", "CharStorage": "int8", "ByteStorage": "uint8",
    "ShortStorage": "int16", "IntStorage": "int32", "LongStorage": "int64", "BoolStorage": "bool",
}  # fmt: skip
# By module and name.
NAMES: Mapping[tuple[str, str], StorageClass | Function] = {
    **{("torch", name): StorageClass(dtype) for name, dtype in _STORAGES.items()},
    ("collections", "OrderedDict"): Function(_new_dict),
    ("torch._utils", "_rebuild_tensor"): Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Function(_tensor),
    ("torch._utils", "_rebuild_parameter"): Function(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Function(_parameter),
}
