"""A safetensors file whose header is known before its data, so that tensors go in in any order."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.checkpoint.source import DTYPE_BYTES, DTYPE_NAMES
from parallel.checkpoint.whole_directory import disk_errors
from parallel.placement import Shape

_CODES = {name: code for code, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written; `dtype` is a torch name."""

    name: str
    shape: Shape
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class PlannedFile:
    """Room for every tensor from the start; each is written once, by any thread.

    Args:
        path: must not exist.
        metadata: strings for the header, beside the format that transformers asks for.

    Raises:
        CheckpointError: the disk is full, or cannot be written.
    """

    def __init__(
        self, path: Path, tensors: Iterable[PlannedTensor], metadata: Mapping[str, str]
    ) -> None:
        self.tensors = {tensor.name: tensor for tensor in tensors}
        header, self._offsets, num_bytes = _header(self.tensors.values(), metadata)
        with disk_errors(path):
            self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            os.pwrite(self._fd, header, 0)
            os.posix_fallocate(self._fd, 0, max(1, len(header) + num_bytes))

    def write(self, name: str, tensor: Tensor) -> memoryview:
        """Put a tensor at its place; returns its bytes, for a sum of them."""
        planned, data = self.tensors[name], tensor_bytes(tensor)
        assert str(tensor.dtype) == f"torch.{planned.dtype}", (name, tensor.dtype, planned.dtype)
        assert tuple(tensor.shape) == planned.shape, (name, tensor.shape, planned.shape)
        with disk_errors(Path(name)):
            _pwrite_all(self._fd, data, self._offsets[name])
        return data

    def close(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """What a file holds of a tensor."""
    array: Any = tensor.contiguous().view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def _header(
    tensors: Iterable[PlannedTensor], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """The file's header, the offset of each tensor in the file, and the bytes of data.

    Wide dtypes first, so that every tensor is aligned to its own size, as the library does.
    """
    ordered = sorted(tensors, key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    starts, position = {}, 0
    for tensor in ordered:
        end = position + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        starts[tensor.name], position = position, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    offsets = {name: base + start for name, start in starts.items()}
    return len(text).to_bytes(8, "little") + text, offsets, position


def _pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
