"""A Hugging Face directory: one file of weights, or several with an index.

safetensors are read where there are any, as transformers does, else pytorch_model.bin.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.json_file import distinct, read_json_object
from parallel.checkpoint.readers.pickled.file import TorchFile
from parallel.checkpoint.readers.safetensors_file import SafetensorsFile
from parallel.checkpoint.source import TensorInfo
from parallel.errors import CheckpointError
from parallel.placement import Index

if TYPE_CHECKING:
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
# Of a file, in every system.
_LONGEST_NAME = 255
BIN_NAME = "pytorch_model.bin"
BIN_INDEX_NAME = "pytorch_model.bin.index.json"
_SAFETENSORS = ".safetensors"


class HuggingFaceSource:
    """The tensors of a directory as transformers writes it.

    Args:
        path: the directory.

    Raises:
        CheckpointError: no weights, a missing or broken shard, an index that points elsewhere.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = self._find_index()
        self._files = {name: open_file(path / name) for name in self._file_names()}
        self.tensors: Mapping[str, TensorInfo] = self._merge()

    def read(self, name: str, index: Index) -> Tensor:
        return self._files[self.tensors[name].file].read(name, index)

    def numbers(self, names: Iterable[str]) -> dict[str, Any]:
        """Tensors of a few integers, as Python's, read without torch."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        found: dict[str, Any] = {}
        for file, held in by_file.items():
            found |= self._files[file].numbers(held)
        return found

    def identity(self) -> dict[str, Any]:
        return {"files": {name: file.identity() for name, file in sorted(self._files.items())}}

    def _find_index(self) -> Path | None:
        """That of safetensors; that of pickles only where no safetensors are."""
        if (self.path / INDEX_NAME).exists():
            return self.path / INDEX_NAME
        is_pickled = (self.path / BIN_INDEX_NAME).exists() and not self._safetensors()
        return self.path / BIN_INDEX_NAME if is_pickled else None

    def _file_names(self) -> list[str]:
        if self._index is not None:
            return sorted(set(read_index(self._index).values()))
        names = self._safetensors()
        if not names and (self.path / BIN_NAME).exists():
            return [BIN_NAME]
        if len(names) != 1:
            raise CheckpointError(self._no_weights(names))
        return names

    def _safetensors(self) -> list[str]:
        return sorted(file.name for file in self.path.glob("*" + _SAFETENSORS))

    def _no_weights(self, names: list[str]) -> str:
        if names:
            return f"{self.path} has {len(names)} safetensors files but no {INDEX_NAME}; add it."
        if any(self.path.glob("*.bin")):
            return f"{self.path} has *.bin files but no {BIN_INDEX_NAME} and no {BIN_NAME}; add it."
        if any(self.path.glob("*.pth")):
            return f"{self.path} has *.pth files but no params.json; add it to consolidated.*.pth."
        return f"{self.path} holds no *.safetensors file; download the weights into it."

    def _merge(self) -> dict[str, TensorInfo]:
        merged: dict[str, TensorInfo] = {}
        for file in self._files.values():
            for name, info in file.tensors.items():
                if name in merged:
                    raise CheckpointError(
                        f"{self.path}: the tensor {name} is in {merged[name].file} and in "
                        f"{info.file}; remove one of them."
                    )
                merged[name] = info
        self._check_index(merged)
        return merged

    def _check_index(self, merged: dict[str, TensorInfo]) -> None:
        if self._index is None:
            return
        for name, file in read_index(self._index).items():
            if name not in merged or merged[name].file != file:
                raise CheckpointError(
                    f"{self._index} says that {name} is in {file}, but it is not; "
                    "download the index and the shards of one revision."
                )


def has_weights(path: Path) -> bool:
    """Whether a directory has files that HuggingFaceSource would read."""
    named = any((path / name).exists() for name in (INDEX_NAME, BIN_NAME, BIN_INDEX_NAME))
    return named or any(path.glob("*" + _SAFETENSORS))


def open_file(path: Path) -> SafetensorsFile | TorchFile:
    """The reader of a file, by the ending of its name."""
    return SafetensorsFile(path) if path.suffix == _SAFETENSORS else TorchFile(path)


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor name -> file name.

    Raises:
        CheckpointError: not an index, or a file name that leaves the directory.
    """
    weight_map = read_json_object(path, hook=distinct).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; download it again.")
    for name, file in weight_map.items():
        if not _is_file_name(file):
            raise CheckpointError(
                f"{path} says that {name} is in {reprlib.repr(file)}, which is not a file name in its "
                "own directory; do not use this checkpoint unless you trust where it comes from."
            )
    return weight_map


def _is_file_name(value: object) -> bool:
    is_short = isinstance(value, str) and len(value) <= _LONGEST_NAME
    return is_short and Path(str(value)).name == value and value not in ("", ".", "..")
