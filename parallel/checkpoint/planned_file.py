"""A safetensors file whose header is known before its data, so that tensors go in in any order."""

from __future__ import annotations

import hashlib
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

_READ_BYTES = 8 << 20
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
    """Room for every tensor from the start; each is written once, whole or in runs of rows, by any
    thread.

    Args:
        path: what stands there, a run that was cut off has written: its data stay.
        metadata: strings for the header, beside the format that transformers asks for.

    Raises:
        CheckpointError: the disk is full, or cannot be written.
    """

    def __init__(
        self, path: Path, tensors: Iterable[PlannedTensor], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        self.tensors = {tensor.name: tensor for tensor in tensors}
        header, self._offsets, num_bytes = _header(self.tensors.values(), metadata)
        with disk_errors(path):
            self._fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
            os.pwrite(self._fd, header, 0)
            # What an earlier run left may be longer, if its disk or somebody has added to it.
            os.ftruncate(self._fd, len(header) + num_bytes)
            os.posix_fallocate(self._fd, 0, max(1, len(header) + num_bytes))

    def write(self, name: str, tensor: Tensor, first_row: int = 0) -> memoryview:
        """Put a tensor, or its rows from `first_row`, in its place; returns the bytes, for a sum."""
        planned, data = self.tensors[name], tensor_bytes(tensor)
        assert str(tensor.dtype) == f"torch.{planned.dtype}", (name, tensor.dtype, planned.dtype)
        assert tuple(tensor.shape[1:]) == planned.shape[1:], (name, tensor.shape, planned.shape)
        start = first_row * (planned.num_bytes // max(1, planned.shape[0]))
        assert start + len(data) <= planned.num_bytes, (name, first_row, tensor.shape)
        with disk_errors(self.path):
            _pwrite_all(self._fd, data, self._offsets[name] + start)
        return data

    def stored_sum(self, name: str) -> str:
        """The sha256 of a tensor's bytes as they lie in the file."""
        total, at = hashlib.sha256(), self._offsets[name]
        end = at + self.tensors[name].num_bytes
        while at < end:
            data = os.pread(self._fd, min(_READ_BYTES, end - at), at)
            total.update(data)
            at += len(data)
        return total.hexdigest()

    def flush(self) -> None:
        """Begin, and wait for, the writing of what is not on the disk yet."""
        with disk_errors(self.path):
            os.fdatasync(self._fd)

    def close(self) -> None:
        with disk_errors(self.path):
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
