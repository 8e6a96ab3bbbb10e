"""How far a calibration has come, so that one that was cut off goes on.

The directory is shared by the ranks:

    layer_0003.safetensors             what a finished layer has become; written by rank 0
    hidden_0004_rank_1.safetensors     the rank's samples as they enter layer 4

A file gets its name when it is whole and on the disk. A rank removes its old samples after every
rank has written its new ones, so that there is always a layer that all ranks can go on from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parallel.checkpoint.regular_file import check_regular, reason
from parallel.errors import CheckpointError
from parallel.group import Group

_KEPT = re.compile(r"(layer_[0-9]{4}|hidden_[0-9]{4}_rank_[0-9]+)\.safetensors")


class CalibrationState:
    """The files of one calibration.

    Args:
        directory: is made where it is missing.
        identity: a text that says all that the result depends on, the number of ranks included.
        group: the ranks; every one must call the same methods.
    """

    def __init__(self, directory: Path, identity: str, group: Group) -> None:
        self.directory = directory
        self._metadata = {"identity": identity}
        self._group = group
        directory.mkdir(parents=True, exist_ok=True)

    def next_layer(self) -> int:
        """The layer to go on from; 0 at the beginning.

        Raises:
            CheckpointError: the directory is of another calibration, or a file is damaged.
        """
        for path in self._kept("*"):
            self._check(path)  # what other ranks kept, too: no rank goes on before all have looked
        mine = max((_layer_of(path) for path in self._hidden_files()), default=0)
        return -int(self._group.all_reduce(torch.tensor([-mine]), "max"))

    def save(self, index: int, layer: Mapping[str, Tensor], hidden: Mapping[int, Tensor]) -> None:
        """Keep a finished layer, and this rank's samples as they enter the next."""
        if self._group.rank == 0:
            self._write(self._layer_path(index), layer)
        new = self._hidden_path(index + 1)
        old = [path for path in self._hidden_files() if path != new]
        samples = {str(sample): tensor.contiguous() for sample, tensor in hidden.items()}
        self._write(new, samples)
        self._group.barrier()
        for path in old:
            path.unlink()

    def layer(self, index: int) -> dict[str, Tensor]:
        """A finished layer's tensors."""
        return self._read(self._layer_path(index))

    def hidden(self, index: int) -> dict[int, Tensor]:
        """This rank's samples as they enter a layer."""
        return {int(name): x for name, x in self._read(self._hidden_path(index)).items()}

    def _layer_path(self, index: int) -> Path:
        return self.directory / f"layer_{index:04}.safetensors"

    def _hidden_path(self, index: int) -> Path:
        return self.directory / f"hidden_{index:04}_rank_{self._group.rank}.safetensors"

    def _hidden_files(self) -> list[Path]:
        return self._kept(f"hidden_*_rank_{self._group.rank}.*")

    def _kept(self, pattern: str) -> list[Path]:
        return sorted(path for path in self.directory.glob(pattern) if _KEPT.fullmatch(path.name))

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        unfinished = path.with_suffix(".unfinished")
        try:
            save_file(dict(tensors), unfinished, metadata=self._metadata)
            _sync(unfinished)
            unfinished.rename(path)
            _sync(self.directory)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be written ({reason(error)}); make room, or give another directory."
            ) from error

    def _read(self, path: Path) -> dict[str, Tensor]:
        with self._open(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def _check(self, path: Path) -> None:
        with self._open(path):
            pass

    @contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        self._check_there(path)
        try:
            with safe_open(path, "pt") as file:
                self._check_identity(path, file.metadata() or {})
                yield file
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({reason(error)}); remove {self.directory} "
                "and calibrate again."
            ) from error

    def _check_there(self, path: Path) -> None:
        """There is no copy of it that its user could give."""
        try:
            check_regular(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{path} must be a file of this unfinished calibration, but is missing or none; "
                f"remove {self.directory} and calibrate again."
            ) from error

    def _check_identity(self, path: Path, metadata: Mapping[str, str]) -> None:
        if metadata != self._metadata:
            raise CheckpointError(
                f"{path} must be of this calibration, but is of another model, text, scheme or "
                f"number of ranks; remove {self.directory}, or give another directory."
            )


def _layer_of(hidden: Path) -> int:
    return int(hidden.name.split("_")[1])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
