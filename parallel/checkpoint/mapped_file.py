"""A file of raw tensors, mapped: any stretch of it as a tensor, touched only where it is read."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.regular_file import check_regular, reason
from parallel.checkpoint.source import DTYPE_BYTES, TensorInfo
from parallel.errors import CheckpointError
from parallel.placement import Index

if TYPE_CHECKING:
    from torch import Tensor

# The mapping is private, as torch refuses to view what cannot be written; without this flag, the
# kernel would refuse to map a file larger than the memory, in case all of it were written to.
_MAP_NORESERVE = 0x4000


class MappedFile:
    """Needs no torch until a tensor is asked for, and maps nothing before.

    Attributes:
        size: bytes of the file when it was opened; who asks for more has not checked its header.

    Raises:
        CheckpointError: the file is missing, or is none.
    """

    def __init__(self, path: Path) -> None:
        check_regular(path)
        self.path = path
        self.size = path.stat().st_size
        self._map: mmap.mmap | None = None

    def tensor(
        self,
        offset: int,
        shape: Sequence[int],
        dtype: str,
        strides: Sequence[int] | None = None,
    ) -> Tensor:
        """A view of the mapped bytes from `offset`; a copy where they are not aligned to the dtype.

        Args:
            dtype: a torch name.
            strides: in entries; None: those of a C-contiguous tensor. An entry may not lie beyond
                the file.
        """
        import torch

        kind: torch.dtype = getattr(torch, dtype)
        if 0 in shape:
            return torch.empty(tuple(shape), dtype=kind)
        strides = strides or _c_strides(shape)
        last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        num_bytes = (last + 1) * kind.itemsize
        assert 0 <= offset <= self.size - num_bytes, (self.path, offset, num_bytes, self.size)
        flat = torch.frombuffer(self._mapped(), dtype=torch.uint8, count=num_bytes, offset=offset)
        flat = flat if flat.data_ptr() % kind.itemsize == 0 else flat.clone()
        return flat.view(kind).as_strided(tuple(shape), tuple(strides))

    def prefetch(self, offset: int, num_bytes: int) -> None:
        """Ask the kernel to begin reading a stretch into the page cache; returns at once."""
        with self.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            self._map = self._open_map()
        return self._map

    def _open_map(self) -> mmap.mmap:
        options: dict[str, Any] = {
            "flags": mmap.MAP_PRIVATE | _MAP_NORESERVE,
            "prot": mmap.PROT_READ | mmap.PROT_WRITE,
        }
        try:
            with self.path.open("rb") as file:
                return mmap.mmap(file.fileno(), self.size, **options)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} cannot be mapped ({reason(error)}); copy it again."
            ) from error


def rows_stretch(info: TensorInfo, offset: int, index: Index) -> tuple[int, int]:
    """Offset and bytes of the whole rows that a slice of a C-contiguous tensor touches."""
    if not info.shape:
        return offset, DTYPE_BYTES[info.dtype]
    row_bytes = math.prod(info.shape[1:]) * DTYPE_BYTES[info.dtype]
    return offset + index[0].start * row_bytes, (index[0].stop - index[0].start) * row_bytes


def _c_strides(shape: Sequence[int]) -> list[int]:
    strides = [1]
    for length in reversed(shape[1:]):
        strides.insert(0, strides[0] * length)
    return strides[: len(shape)]
