"""A Hugging Face directory: one file of weights, or several with an index.

Which of them is read, and by which names its tensors go, is as in transformers: a file or an index of
its own names goes before others beside it, and a bare decoder's names (AutoModel.save_pretrained) become
those of the whole model.
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
from parallel.model.placements import EMBEDDING, HEAD
from parallel.placement import Index

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
BIN_NAME = "pytorch_model.bin"
BIN_INDEX_NAME = "pytorch_model.bin.index.json"
# What transformers looks for, in its order: the first that is there is read, whatever lies beside it.
_ORDER = (SINGLE_NAME, INDEX_NAME, BIN_NAME, BIN_INDEX_NAME)
_ADAPTER = "adapter_model.safetensors"
_SAFETENSORS = ".safetensors"
# Of a file, in every system.
_LONGEST_NAME = 255
# What the names of a bare decoder begin with, which are below `model.` in the whole model.
_BARE = ("embed_tokens.", "layers.", "norm.")


class HuggingFaceSource:
    """The tensors of a directory as transformers writes it.

    Args:
        path: the directory.
        is_tied: by its config.json; then an lm_head that was saved alone is the embedding too.

    Raises:
        CheckpointError: no weights, a missing or broken shard, an index that points elsewhere.
    """

    def __init__(self, path: Path, *, is_tied: bool = False) -> None:
        self.path = path
        self._index = find_index(path)
        self._files = {name: open_file(path / name) for name in _file_names(path)}
        merged = self._merge()
        self._stored = model_names(merged, is_tied=is_tied)
        if len(self._stored) < len(merged):
            raise CheckpointError(
                f"{path}: a tensor is there with and without `model.` before its name; remove one of "
                "them."
            )
        self.tensors: Mapping[str, TensorInfo] = {
            name: merged[stored] for name, stored in self._stored.items()
        }

    def read(self, name: str, index: Index) -> Tensor:
        return self._files[self.tensors[name].file].read(self._stored[name], index)

    def are_one(self, first: str, second: str) -> bool:
        """Whether two names stand for the same bytes, as those of tied weights in a pickle do."""
        file = self._files[self.tensors[first].file]
        return (
            isinstance(file, TorchFile)
            and self.tensors[second].file == self.tensors[first].file
            and file.are_one(self._stored[first], self._stored[second])
        )

    def numbers(self, names: Iterable[str]) -> dict[str, Any]:
        """Tensors of a few integers, as Python's, read without torch."""
        by_file: dict[str, dict[str, str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, {})[self._stored[name]] = name
        found: dict[str, Any] = {}
        for file, held in by_file.items():
            numbers = self._files[file].numbers(held)
            found |= {held[stored]: number for stored, number in numbers.items()}
        return found

    def identity(self) -> dict[str, Any]:
        return {"files": {name: file.identity() for name, file in sorted(self._files.items())}}

    def _merge(self) -> dict[str, TensorInfo]:
        """The tensors of all files, by the names that stand in them."""
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


def model_names(stored: Iterable[str], *, is_tied: bool) -> dict[str, str]:
    """The names of the whole model's tensors, each with the one that stands in the files.

    Args:
        is_tied: by config.json; then an lm_head that was saved alone is the embedding.
    """
    names = {f"model.{name}" if name.startswith(_BARE) else name: name for name in stored}
    if is_tied and HEAD in names and EMBEDDING not in names:
        names[EMBEDDING] = names.pop(HEAD)
    return names


def find_index(path: Path) -> Path | None:
    """The index of the files that are read; None where one file holds all."""
    name = _first(path)
    return path / name if name in (INDEX_NAME, BIN_INDEX_NAME) else None


def names_weights(path: Path) -> bool:
    """Whether a directory has a file, or an index, of a name that transformers looks for."""
    return _first(path) is not None


def find_files(path: Path) -> list[Path]:
    """The files that are read, of which some may not be there.

    Raises:
        CheckpointError: there are none, or it cannot be told which; or an index that is broken.
    """
    return [path / name for name in _file_names(path)]


def _first(path: Path) -> str | None:
    return next((name for name in _ORDER if (path / name).exists()), None)


def _file_names(path: Path) -> list[str]:
    index, name = find_index(path), _first(path)
    if index is not None:
        return sorted(set(read_index(index).values()))
    if name is not None:
        return [name]
    names = sorted(file.name for file in path.glob("*" + _SAFETENSORS))
    if len(names) != 1 or names == [_ADAPTER]:
        raise CheckpointError(_no_weights(path, names))
    return names


def _no_weights(path: Path, names: list[str]) -> str:
    if names == [_ADAPTER]:
        return f"{path} holds an adapter alone ({_ADAPTER}); merge it into its base, and give that."
    if names:
        return (
            f"{path} has {len(names)} safetensors files, but none is {SINGLE_NAME}, and there is no "
            f"{INDEX_NAME}; add it, or give the one of the weights that name."
        )
    if any(path.glob("*.bin")):
        return f"{path} has *.bin files but no {BIN_INDEX_NAME} and no {BIN_NAME}; add it."
    if any(path.glob("*.pth")):
        return f"{path} has *.pth files but no params.json; add it to consolidated.*.pth."
    return f"{path} holds no *.safetensors file; download the weights into it."


def has_weights(path: Path) -> bool:
    """Whether a directory has files that HuggingFaceSource would read."""
    return names_weights(path) or any(path.glob("*" + _SAFETENSORS))


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
