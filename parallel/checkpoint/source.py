"""Source: what a checkpoint's reader offers, whatever the format on disk. Needs no torch to open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from parallel.placement import Index, Shape

if TYPE_CHECKING:
    from torch import Tensor

DTYPE_NAMES: Mapping[str, str] = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8",
    "I32": "int32", "I64": "int64",
}  # fmt: skip
DTYPE_BYTES: Mapping[str, int] = {
    "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "int32": 4, "int64": 8,
}  # fmt: skip
FLOAT_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor. `dtype` is a torch name such as `bfloat16`."""

    shape: Shape
    dtype: str
    file: str


class TensorFile(Protocol):
    """One file of tensors, whatever its format: checked when it is opened, read on demand."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of a tensor, contiguous, in its stored dtype; a view of the file where it can be."""
        ...

    def prefetch(self, name: str, index: Index) -> None:
        """Ask the kernel to begin reading a slice, all of it at once, as `read` does first."""
        ...

    def identity(self) -> dict[str, Any]:
        """What tells the file from another: its size, and a hash of its header or index."""
        ...


class Source(Protocol):
    """A checkpoint whose names, shapes and dtypes are known before any data is read."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, index: Index) -> Tensor:
        """The given slice of a tensor, in its stored dtype, on the CPU."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the files are, without host, time or absolute path: names, sizes, header hashes."""
        ...
