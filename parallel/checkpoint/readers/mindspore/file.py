"""One MindSpore `.ckpt` file: its records are found when it is opened, tensors mapped on demand."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.mapped_file import MappedFile
from parallel.checkpoint.readers.mindspore.chunks import (
    StoredTensor,
    byte_index,
    byte_shape,
    row_runs,
    stretches,
)
from parallel.checkpoint.readers.mindspore.protobuf_fields import FieldError
from parallel.checkpoint.readers.mindspore.records import (
    TRAILER_BYTES,
    Records,
    scan_records,
)
from parallel.checkpoint.regular_file import reason
from parallel.checkpoint.source import TensorInfo
from parallel.errors import CheckpointError
from parallel.placement import Index, index_shape

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_BYTES = 1 << 20
# What else people have under this name, by how it begins.
_OTHERS: Mapping[bytes, str] = {
    b"PK\x03\x04": "a file of torch.save; name it pytorch_model.bin if it holds a Hugging Face model",
    b"\x80": "a pickle; name it pytorch_model.bin if it holds a Hugging Face model",
    b"GGUF": "a GGUF file of llama.cpp; give the checkpoint that it was converted from",
    b"\x89HDF": "an HDF5 file; give the checkpoint in safetensors",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself with git lfs pull",
    b"<": "a web page or XML; download the file again",
}
_BEGINNING_BYTES = max(map(len, _OTHERS))


class MindSporeFile:
    """Reads nothing but what stands between the contents, however large they are.

    Attributes:
        crc32: the checksum of the file that its writer left at the end; None: it left none.
        int4: the tensors of which an entry is a byte with two values; they are read as uint8.

    Raises:
        CheckpointError: the file is missing, cut off inside a record, encrypted, none of MindSpore's,
            or holds what is no tensor of numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = MappedFile(path)
        records = _scan(path, self._mapped.size)
        self.crc32 = records.crc32
        self._stored = records.tensors
        self.int4 = frozenset(name for name, at in self._stored.items() if at.word == "Int4")
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(stored.shape, stored.dtype, path.name)
            for name, stored in records.tensors.items()
        }

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of a tensor: a view of the mapped file where it lies there contiguous and aligned
        (MindSpore aligns nothing), else a copy of its entries alone."""
        import torch

        stored = self._stored[name]
        dtype: torch.dtype = getattr(torch, stored.dtype)
        shape = index_shape(index)
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        self.prefetch(name, index)
        return self._read_bytes(stored, byte_index(stored, index)).view(dtype).reshape(shape)

    def prefetch(self, name: str, index: Index) -> None:
        """Whole rows are asked for, as a slice of columns touches the pages of nearly all."""
        stored = self._stored[name]
        shape = byte_shape(stored)
        rows = byte_index(stored, index)[0]
        row_bytes = math.prod(shape[1:])
        for offset, num_bytes in stretches(stored, rows.start * row_bytes, rows.stop * row_bytes):
            self._mapped.prefetch(offset, num_bytes)

    def identity(self) -> dict[str, Any]:
        """Size, a hash of all names, dtypes, shapes and places, and the checksum where there is one;
        without that a file with the same records may still hold other data."""
        listed = [
            [name, item.word, item.shape, [[part.offset, part.num_bytes] for part in item.chunks]]
            for name, item in self._stored.items()
        ]
        header = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        found: dict[str, Any] = {"size": self._mapped.size, "header_sha256": header}
        return found if self.crc32 is None else {**found, "crc32": self.crc32}

    def check_sum(self, on_bytes: Callable[[int], object] = lambda _: None) -> bool:
        """Compare the file with the checksum at its end, which takes reading all of it.

        Args:
            on_bytes: told how many bytes were read, as they are.

        Returns:
            False where there is no checksum: then nothing is known of the tensors' bytes.

        Raises:
            CheckpointError: the file is not what its writer wrote.
        """
        if self.crc32 is None:
            return False
        found = _crc32(self.path, self._mapped.size - TRAILER_BYTES, on_bytes)
        if found != self.crc32:
            raise CheckpointError(
                f"{self.path} must have the checksum {self.crc32:08x}, which stands at its end, but "
                f"has {found:08x}; copy it again."
            )
        return True

    def _read_bytes(self, stored: StoredTensor, index: Index) -> Tensor:
        """A slice of a tensor whose last dimension is counted in bytes, aligned to its dtype."""
        import torch

        rows, columns = index[0], index[1:]
        runs = list(row_runs(stored, rows.start, rows.stop))
        if len(runs) == 1:
            view = self._rows(stored, *runs[0])[:, *columns]
            is_aligned = view.data_ptr() % stored.item_bytes == 0
            return view if is_aligned and view.is_contiguous() else _fresh(view)
        joined = torch.empty(index_shape(index), dtype=torch.uint8)
        for start, stop in runs:
            part = self._rows(stored, start, stop)[:, *columns]
            joined[start - rows.start : stop - rows.start] = part
        return joined

    def _rows(self, stored: StoredTensor, start: int, stop: int) -> Tensor:
        """Bytes of the rows of one run, all columns: a view, or a row that is joined."""
        import torch

        shape = (stop - start, *byte_shape(stored)[1:])
        row_bytes = math.prod(shape[1:])
        parts = [
            self._mapped.tensor(offset, (num_bytes,), "uint8")
            for offset, num_bytes in stretches(stored, start * row_bytes, stop * row_bytes)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)


def _fresh(view: Tensor) -> Tensor:
    """A copy, which an allocator aligns."""
    import torch

    return torch.empty(view.shape, dtype=view.dtype).copy_(view)


def _scan(path: Path, size: int) -> Records:
    try:
        with path.open("rb") as file:
            _check_beginning(path, file.read(_BEGINNING_BYTES))
            return scan_records(file, size)
    except FieldError as error:
        raise CheckpointError(
            f"{path} is no whole MindSpore checkpoint of plain tensors: {error}; copy it again, or "
            "save the network's parameters alone."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); copy it again.") from error


def _check_beginning(path: Path, found: bytes) -> None:
    """Every record of a plain file begins with the same byte; other kinds of file are named."""
    for beginning, what in _OTHERS.items():
        if found.startswith(beginning):
            raise CheckpointError(f"{path} must be a MindSpore checkpoint, but is {what}.")
    if not found.startswith(b"\n"):
        what = f"begins with 0x{found[:1].hex()}" if found else "is empty"
        raise CheckpointError(
            f"{path} must begin with a record of a tensor, but {what}; copy it again, or, if it is "
            "encrypted, load it with its key in MindSpore and save it without."
        )


def _crc32(path: Path, num_bytes: int, on_bytes: Callable[[int], object]) -> int:
    """Of the first so many bytes."""
    found, left = 0, num_bytes
    with path.open("rb") as file:
        while left and (block := file.read(min(_BLOCK_BYTES, left))):
            found = zlib.crc32(block, found)
            left -= len(block)
            on_bytes(len(block))
    return found
