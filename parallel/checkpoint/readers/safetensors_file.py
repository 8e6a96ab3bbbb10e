"""One .safetensors file: a header that is checked when it is opened, and tensors mapped on demand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from parallel.checkpoint.mapped_file import MappedFile, rows_stretch
from parallel.checkpoint.regular_file import check_regular, reason
from parallel.checkpoint.source import DTYPE_NAMES, TensorInfo
from parallel.errors import CheckpointError
from parallel.placement import Index

if TYPE_CHECKING:
    from torch import Tensor


class SafetensorsFile:
    """The library checks lengths, overlaps and sizes; here its errors become sentences.

    Raises:
        CheckpointError: the file is missing, cut off, or has a dtype that weights do not have.

    Attributes:
        metadata: the strings that the writer left in the header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self.tensors: Mapping[str, TensorInfo] = self._read_infos()
        self._mapped = MappedFile(path)

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of a tensor; a view of the mapped file where it is contiguous."""
        info = self.tensors[name]
        offset = self._offsets[name]
        return self._mapped.tensor(offset, info.shape, info.dtype)[index].contiguous()

    def prefetch(self, name: str, index: Index) -> None:
        """Whole rows are asked for, as a slice of columns touches the pages of nearly all."""
        self._mapped.prefetch(*rows_stretch(self.tensors[name], self._offsets[name], index))

    def numbers(self, names: Iterable[str]) -> dict[str, Any]:
        """Tensors of a few integers, as Python's, read without torch."""
        with _open(self.path, "numpy") as file:
            return {name: file.get_tensor(name).tolist() for name in names}

    def identity(self) -> dict[str, Any]:
        """Size and header hash; a file with the same header may still hold other data."""
        return {
            "size": self._mapped.size,
            "header_sha256": hashlib.sha256(self._read_header()).hexdigest(),
        }

    @cached_property
    def _offsets(self) -> dict[str, int]:
        """Where each tensor begins in the file; the library has checked that they lie inside."""
        header = self._read_header()
        entries = json.loads(header[8:])
        return {name: len(header) + entries[name]["data_offsets"][0] for name in self.tensors}

    def _read_header(self) -> bytes:
        """With the eight bytes of its length."""
        with self.path.open("rb") as file:
            length = file.read(8)
            return length + file.read(int.from_bytes(length, "little"))

    def _read_infos(self) -> dict[str, TensorInfo]:
        # The "numpy" framework is never asked for data: it only spares the import of torch.
        with _open(self.path, "numpy") as file:
            self.metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: self._info(name, item) for name, item in slices.items()}

    def _info(self, name: str, item: Any) -> TensorInfo:
        code = item.get_dtype()
        if code not in DTYPE_NAMES:
            raise CheckpointError(
                f"{self.path}: the tensor {name} has dtype {code}, which is not read; "
                f"known: {', '.join(DTYPE_NAMES)}."
            )
        return TensorInfo(tuple(item.get_shape()), DTYPE_NAMES[code], self.path.name)


def _open(path: Path, framework: str) -> Any:
    check_regular(path)
    try:
        return safe_open(path, framework)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({reason(error)}); copy it again."
        ) from error
