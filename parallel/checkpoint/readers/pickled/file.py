"""One file of torch.save (.bin, .pt, .pth): nothing in it is run, and tensors are mapped on demand.

The file is a zip archive: `data.pkl` describes the tensors, `data/<key>` are their storages, which
begin at multiples of 64 bytes. Two tensors may share a storage, and a tensor may have any strides.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.mapped_file import MappedFile
from parallel.checkpoint.readers.pickled.machine import MOST_PICKLE_BYTES, read_pickle
from parallel.checkpoint.readers.pickled.names import PickledTensor
from parallel.checkpoint.readers.pickled.stored_zip import StoredZip
from parallel.checkpoint.regular_file import check_regular, reason
from parallel.checkpoint.source import DTYPE_BYTES, TensorInfo
from parallel.errors import CheckpointError
from parallel.placement import Index, index_shape

if TYPE_CHECKING:
    from torch import Tensor

# Keys under which a training script may have put the state dict, alone.
_WRAPPERS = ("model", "state_dict")
_BYTEORDER_BYTES = 16
# torch's magic number as it is pickled: what a file of torch before 1.6 begins with.
_LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_WITHIN = 64


class TorchFile:
    """A state dict that torch.save wrote, in torch 1.6 or later.

    Raises:
        CheckpointError: the file is missing, cut off or damaged; holds anything but a state dict of
            tensors; or a tensor that reaches beyond its storage or has a dtype that weights do not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_regular(path)
        _refuse_legacy(path)
        self._zip = StoredZip(path)
        self._mapped = MappedFile(path)
        self._folder = self._find_folder()
        self._check_byte_order()
        self._pickle = self._zip.read(f"{self._folder}/data.pkl", MOST_PICKLE_BYTES)
        self._pickled = self._state_dict(read_pickle(self._pickle, path))
        for name, tensor in self._pickled.items():
            self._check_tensor(name, tensor)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tensor.shape, tensor.storage.dtype, path.name)
            for name, tensor in self._pickled.items()
        }

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of a tensor; a view of the mapped file where it is contiguous."""
        self.prefetch(name, index)
        tensor = self._pickled[name]
        shape, dtype = index_shape(index), tensor.storage.dtype
        return self._mapped.tensor(
            self._start(name, index), shape, dtype, tensor.strides
        ).contiguous()

    def prefetch(self, name: str, index: Index) -> None:
        """All that lies from the first entry of the slice to the last is asked for."""
        if 0 in index_shape(index):
            return
        strides = self._pickled[name].strides
        last = sum((cut.stop - cut.start - 1) * n for cut, n in zip(index, strides, strict=True))
        num_bytes = (last + 1) * DTYPE_BYTES[self.tensors[name].dtype]
        self._mapped.prefetch(self._start(name, index), num_bytes)

    def numbers(self, names: Iterable[str]) -> dict[str, Any]:
        """Tensors of a few integers, as Python's."""
        return {name: self.read(name, self._whole(name)).tolist() for name in names}

    def are_one(self, first: str, second: str) -> bool:
        """Whether two names stand for the same entries of one storage, as those of tied weights do."""
        return self._pickled[first] == self._pickled[second]

    def identity(self) -> dict[str, Any]:
        """Size, and the hash of what describes the tensors and, by CRC, their bytes."""
        described = hashlib.sha256(self._zip.directory + self._pickle)
        return {"size": self._mapped.size, "header_sha256": described.hexdigest()}

    def _start(self, name: str, index: Index) -> int:
        """Where the first entry of a slice lies in the file."""
        tensor = self._pickled[name]
        skipped = sum(cut.start * n for cut, n in zip(index, tensor.strides, strict=True))
        storage = self._zip.entries[self._entry(tensor)]
        return storage.offset + (tensor.offset + skipped) * DTYPE_BYTES[tensor.storage.dtype]

    def _whole(self, name: str) -> Index:
        return tuple(slice(0, length) for length in self.tensors[name].shape)

    def _entry(self, tensor: PickledTensor) -> str:
        return f"{self._folder}/data/{tensor.storage.key}"

    def _find_folder(self) -> str:
        """The one folder in which everything is: `archive`, or the name that the file first had."""
        folders = [
            folder
            for folder, _, rest in (name.partition("/") for name in self._zip.entries)
            if rest == "data.pkl"
        ]
        if len(folders) != 1:
            raise CheckpointError(
                f"{self.path} is a zip archive with {len(folders)} data.pkl, but torch.save writes "
                "one; give what torch.save wrote."
            )
        return folders[0]

    def _check_byte_order(self) -> None:
        """torch before 2.1 did not say it, and wrote little-endian files on the machines there were."""
        name = f"{self._folder}/byteorder"
        if name in self._zip.entries and self._zip.read(name, _BYTEORDER_BYTES) != b"little":
            raise CheckpointError(
                f"{self.path} was not written in little-endian byte order, which alone is read; save "
                "it again on a little-endian machine."
            )

    def _state_dict(self, value: object) -> dict[str, PickledTensor]:
        state = _unwrap(value)
        if not isinstance(state, dict) or not state:
            raise CheckpointError(
                f"{self.path} must hold a state dict, but holds "
                f"{'an empty one' if state == {} else f'a {type(state).__name__}'}; save "
                "model.state_dict()."
            )
        for name, item in state.items():
            if not isinstance(item, PickledTensor) or not isinstance(name, str):
                raise CheckpointError(
                    f"{self.path}: {_shown(name)} is no tensor but a {type(item).__name__}; save the "
                    "state dict alone, or under the one key 'model' or 'state_dict'."
                )
        return state

    def _check_tensor(self, name: str, tensor: PickledTensor) -> None:
        storage = tensor.storage
        if storage.dtype not in DTYPE_BYTES:
            raise CheckpointError(
                f"{self.path}: the tensor {_shown(name)} must have one of the dtypes "
                f"{', '.join(DTYPE_BYTES)}, but has {storage.dtype}; save it in one of them."
            )
        entry = self._zip.entries.get(self._entry(tensor))
        num_bytes = DTYPE_BYTES[storage.dtype]
        if entry is None or entry.size != storage.count * num_bytes:
            raise self._beyond(name, f"its storage {_shown(storage.key)} is not in the file")
        # A stride of 0 repeats entries: without a bound, a few bytes could claim any shape.
        if math.prod(max(length, 1) for length in tensor.shape) * num_bytes > self._mapped.size:
            raise self._beyond(name, f"its shape {list(tensor.shape)} is larger than the file")
        if 0 in tensor.shape:
            return
        last = sum((n - 1) * by for n, by in zip(tensor.shape, tensor.strides, strict=True))
        if tensor.offset + last >= storage.count:
            raise self._beyond(name, "its strides reach beyond its storage")

    def _beyond(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: the tensor {_shown(name)} cannot be read, as {what}; copy the file again."
        )


def _unwrap(value: object) -> object:
    if isinstance(value, dict) and len(value) == 1:
        key, inner = next(iter(value.items()))
        return inner if key in _WRAPPERS and isinstance(inner, dict) else value
    return value


def _refuse_legacy(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(_LEGACY_WITHIN)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); copy it again.") from error
    if _LEGACY in start:
        raise CheckpointError(
            f"{path} is in the format of torch before 1.6, which is not read; convert it: "
            "torch.save(torch.load(FILE, weights_only=True), NEW_FILE)."
        )


def _shown(value: object) -> str:
    text = str(value)
    return repr(text) if len(text) <= 200 else repr(text[:200]) + "…"
