"""The weight files of a MindFormers directory: of the whole model, or of each rank. Needs no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from parallel.checkpoint.readers.huggingface import (
    INDEX_NAME,
    SINGLE_NAME,
    find_index,
    read_index,
)
from parallel.checkpoint.readers.mindformers.names import is_mindformers_name
from parallel.checkpoint.readers.mindformers.strategy import is_strategy
from parallel.checkpoint.readers.mindspore.file import MindSporeFile
from parallel.checkpoint.readers.safetensors_file import SafetensorsFile
from parallel.checkpoint.readers.safetensors_header import is_safetensors
from parallel.checkpoint.source import TensorFile
from parallel.errors import CheckpointError

_RANK = re.compile(r"rank_(0|[1-9]\d{0,5})")
# Of more, the names that a message shows.
_MOST_SHOWN = 4


class WeightFiles:
    """Files that hold one set of tensors together: the whole model's, or one rank's.

    Attributes:
        path: their directory.
        files: each file by its name.
        places: the file that a tensor is in.

    Raises:
        CheckpointError: a file that cannot be read, or a tensor in two of them.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path = path
        self.files: Mapping[str, TensorFile] = {name: _open_file(path / name) for name in names}
        self.places: Mapping[str, TensorFile] = self._merge()

    def _merge(self) -> dict[str, TensorFile]:
        merged: dict[str, TensorFile] = {}
        for file in self.files.values():
            for name in file.tensors:
                if name in merged:
                    raise CheckpointError(
                        f"{self.path}: the tensor {name} is in {merged[name].path.name} and in "
                        f"{file.path.name}; keep the files of one checkpoint alone."
                    )
                merged[name] = file
        return merged


def weights_directory(path: Path) -> Path:
    """The directory of a checkpoint that is given by its only file of weights, or by one of its
    ranks', as MindFormers' users do; any other path as it is.

    Raises:
        CheckpointError: there are other weights beside the file.
    """
    # os.path answers also for names that no file system takes; who opens them says what is wrong.
    if os.path.isdir(path) and _is_part(path):
        return path.parent
    if path.suffix not in (".ckpt", ".safetensors") or not os.path.isfile(path):
        return path
    if _is_part(path.parent):
        return path.parent.parent
    names = _weight_names(path.parent)
    if names != [path.name]:
        raise CheckpointError(
            f"`checkpoint` {path} must be the only file of weights in its directory, which is read with "
            f"it, but {len(names) - 1} more are there; give the directory if they belong together, or "
            "move the file into one of its own."
        )
    return path.parent


def has_weights(path: Path) -> bool:
    """Whether weights in a form of MindFormers' lie in a directory, or in those of its ranks."""
    return bool(_weight_names(path) or _rank_folders(path))


def is_mindformers(path: Path) -> bool:
    """Whether a directory holds MindFormers' weights: `.ckpt` files, ranks' directories, or
    safetensors whose names are MindFormers'.

    Raises:
        CheckpointError: the index or the first safetensors file cannot be read.
    """
    if any(path.glob("*.safetensors")):
        return any(is_mindformers_name(name) for name in _safetensors_names(path))
    if any(path.glob("pytorch_model*.bin")):
        return False  # a .ckpt beside is some trainer's
    if _weight_names(path):
        return True
    # Other directories of ranks, such as our own, hold safetensors with other names.
    return any(
        any(folder.glob("*.ckpt")) or is_mindformers(folder) for folder in _rank_folders(path)
    )


def open_ranks(path: Path) -> list[WeightFiles]:
    """The files of each rank, in order; those of the whole model are one rank's.

    Raises:
        CheckpointError: what is there is not one checkpoint.
    """
    names, folders = _weight_names(path), _rank_folders(path)
    if names and folders:
        raise CheckpointError(
            f"{path} must hold the files of the whole model or directories of ranks, but holds "
            f"{names[0]} and {folders[0].name}; keep one of the two."
        )
    if names:
        return [WeightFiles(path, _listed(path, names))]
    expected = [path / f"rank_{rank}" for rank in range(len(folders))]
    if folders != expected:
        missing = next(folder for folder in expected if folder not in folders)
        raise CheckpointError(
            f"{path} must hold rank_0 to rank_{len(folders) - 1}, as it has {len(folders)} "
            f"directories of ranks, but {missing.name} is missing; copy all ranks' files."
        )
    return [WeightFiles(folder, [_only_file(folder)]) for folder in folders]


def common_names(ranks: Sequence[WeightFiles]) -> list[str]:
    """The tensors that every rank holds.

    Raises:
        CheckpointError: a rank lacks one that another has.
    """
    first, *others = ranks
    for rank in others:
        differing = sorted(rank.places.keys() ^ first.places.keys())
        if differing:
            lacking = rank if differing[0] in first.places else first
            raise CheckpointError(
                f"{lacking.path} must hold the tensors of the other ranks, but lacks "
                f"{differing[0]}; copy all ranks' files of one checkpoint, saved whole."
            )
    return list(first.places)


def _open_file(path: Path) -> TensorFile:
    is_mindspore = path.suffix == ".ckpt" and not is_safetensors(path)
    return MindSporeFile(path) if is_mindspore else SafetensorsFile(path)


def _is_part(folder: Path) -> bool:
    """Whether a directory is one rank's, and not a whole checkpoint that is only called so."""
    is_whole = any(any(folder.glob(name)) for name in ("config.json", "params.json", "*.y*ml"))
    return _RANK.fullmatch(folder.name) is not None and _has_weights(folder) and not is_whole


def _weight_names(path: Path) -> list[str]:
    """The weight files in a directory itself, of one kind.

    Raises:
        CheckpointError: there are both.
    """
    checkpoints = sorted(file.name for file in path.glob("*.ckpt") if not is_strategy(file))
    safetensors = sorted(file.name for file in path.glob("*.safetensors"))
    if checkpoints and safetensors:
        raise CheckpointError(
            f"{path} must hold one checkpoint, but holds {checkpoints[0]} and {safetensors[0]}; keep "
            "one of the two kinds."
        )
    return checkpoints or safetensors


def _rank_folders(path: Path) -> list[Path]:
    """Directories of ranks with weights in them, by rank."""
    found = [folder for folder in path.glob("rank_*") if _RANK.fullmatch(folder.name)]
    found = [folder for folder in found if _has_weights(folder)]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("rank_")))


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.ckpt")) or any(folder.glob("*.safetensors"))


def _only_file(folder: Path) -> str:
    names = _weight_names(folder)
    if len(names) != 1:
        shown = ", ".join(names[:_MOST_SHOWN]) or "none"
        raise CheckpointError(
            f"{folder} must hold one file of weights, but holds {len(names)} ({shown}); keep the one "
            "that is wanted."
        )
    return names[0]


def _listed(path: Path, names: list[str]) -> list[str]:
    """Those that an index lists, where there is one; each must be there."""
    if not (path / INDEX_NAME).exists() or names[0].endswith(".ckpt"):
        return names
    return sorted(set(read_index(path / INDEX_NAME).values()))


def _safetensors_names(path: Path) -> Iterator[str]:
    index = find_index(path)
    if index is not None and index.name == INDEX_NAME:
        return iter(read_index(index))
    single = path / SINGLE_NAME
    file = single if single.exists() else min(path.glob("*.safetensors"))
    return iter(SafetensorsFile(file).tensors)
