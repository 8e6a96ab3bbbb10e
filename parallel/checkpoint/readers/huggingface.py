"""A Hugging Face directory: one safetensors file, or several with an index."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.json_file import distinct, read_json_object
from parallel.checkpoint.readers.safetensors_file import SafetensorsFile
from parallel.checkpoint.source import TensorInfo
from parallel.errors import CheckpointError
from parallel.placement import Index

if TYPE_CHECKING:
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
# Of a file, in every system.
_LONGEST_NAME = 255


class HuggingFaceSource:
    """The tensors of a directory as transformers writes it.

    Args:
        path: the directory.

    Raises:
        CheckpointError: no weights, a missing or broken shard, an index that points elsewhere.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = {name: SafetensorsFile(path / name) for name in self._file_names()}
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

    def _file_names(self) -> list[str]:
        if (self.path / INDEX_NAME).exists():
            return sorted(set(read_index(self.path / INDEX_NAME).values()))
        names = sorted(file.name for file in self.path.glob("*.safetensors"))
        if len(names) != 1:
            raise CheckpointError(self._no_weights(names))
        return names

    def _no_weights(self, names: list[str]) -> str:
        if names:
            return f"{self.path} has {len(names)} safetensors files but no {INDEX_NAME}; add it."
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pth")):
            return f"{self.path} holds pickled weights only; convert them to safetensors first."
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
        if not (self.path / INDEX_NAME).exists():
            return
        for name, file in read_index(self.path / INDEX_NAME).items():
            if name not in merged or merged[name].file != file:
                raise CheckpointError(
                    f"{self.path / INDEX_NAME} says that {name} is in {file}, but it is not; "
                    "download the index and the shards of one revision."
                )


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
