"""One .safetensors file: a header that is checked when it is opened, and tensors mapped on demand."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.mapped_file import MappedFile, rows_stretch
from parallel.checkpoint.readers.safetensors_header import read_header
from parallel.checkpoint.source import DTYPE_BYTES, TensorInfo
from parallel.errors import CheckpointError
from parallel.placement import Index

if TYPE_CHECKING:
    from torch import Tensor

# The codes of Python's struct.
_INTEGERS: Mapping[str, str] = {"int8": "b", "uint8": "B", "int32": "i", "int64": "q"}
_MOST_NUMBERS = 8


class SafetensorsFile:
    """Names, shapes, dtypes and offsets come from one reading of the header.

    Raises:
        CheckpointError: the file is missing, cut off, or has a dtype that weights do not have.

    Attributes:
        metadata: the strings that the writer left in the header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header = read_header(path)
        self.metadata: Mapping[str, str] = self._header.metadata
        self.tensors: Mapping[str, TensorInfo] = self._header.infos
        self._mapped = MappedFile(path)
        if self._mapped.size != self._header.size:
            raise CheckpointError(f"{path} changed while it was opened; wait until it is whole.")

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of a tensor; a view of the mapped file where it is contiguous."""
        info = self.tensors[name]
        self.prefetch(name, index)
        offset = self._header.offsets[name]
        return self._mapped.tensor(offset, info.shape, info.dtype)[index].contiguous()

    def prefetch(self, name: str, index: Index) -> None:
        """Whole rows are asked for, as a slice of columns touches the pages of nearly all."""
        self._mapped.prefetch(*rows_stretch(self.tensors[name], self._header.offsets[name], index))

    def stretch(self, name: str) -> tuple[int, int]:
        """Offset and number of a tensor's bytes in the file."""
        info = self.tensors[name]
        return self._header.offsets[name], math.prod(info.shape) * DTYPE_BYTES[info.dtype]

    def numbers(self, names: Iterable[str]) -> dict[str, Any]:
        """Tensors of a few integers, or of one alone, as Python's lists, read without torch."""
        with self.path.open("rb") as file:
            return {name: self._numbers(file.fileno(), name) for name in names}

    def identity(self) -> dict[str, Any]:
        """Size and header hash; a file with the same header may still hold other data."""
        return {"size": self._header.size, "header_sha256": self._header.sha256}

    def _numbers(self, fd: int, name: str) -> list[int]:
        info, (offset, num_bytes) = self.tensors[name], self.stretch(name)
        count = math.prod(info.shape)
        if info.dtype not in _INTEGERS or len(info.shape) > 1 or count > _MOST_NUMBERS:
            raise CheckpointError(
                f"{self.path}: {name} must be at most {_MOST_NUMBERS} integers, but is {info.dtype} of "
                f"shape {list(info.shape)[:8]}; download it again."
            )
        data = os.pread(fd, num_bytes, offset)
        return list(struct.unpack(f"<{count}{_INTEGERS[info.dtype]}", data))
