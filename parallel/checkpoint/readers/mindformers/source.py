"""MindFormers' checkpoints as a source: by Hugging Face's names, whatever file or rank they lie in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.readers.mindformers.files import common_names, open_ranks
from parallel.checkpoint.readers.mindformers.parts import PartJoiner
from parallel.checkpoint.readers.mindformers.strategy import find_strategy
from parallel.checkpoint.readers.mindspore.sums import has_right_sum
from parallel.checkpoint.readers.pieces import PiecedTensor
from parallel.checkpoint.source import TensorFile, TensorInfo
from parallel.errors import CheckpointError
from parallel.model.config import ModelConfig
from parallel.model.placements import placement_table
from parallel.placement import Index, Shape

if TYPE_CHECKING:
    from torch import Tensor


class MindFormersSource:
    """Whole files, or `rank_0/ … rank_{n-1}/` with one each.

    Ranks' parts are placed by a strategy file where there is one, else by MindFormers' rules, and must
    join to the shapes of the config.

    Attributes:
        files: every file, by its path below the directory.

    Raises:
        CheckpointError: a file that cannot be read, or parts that are not one checkpoint of this model.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.path = path
        self._ranks = open_ranks(path)
        self._strategy = find_strategy(path) if len(self._ranks) > 1 else None
        self.files: Mapping[str, TensorFile] = {
            (rank.path / name).relative_to(path).as_posix(): file
            for rank in self._ranks
            for name, file in rank.files.items()
        }
        rows = placement_table(config, own_head=True).values()
        self._pieced = self._join_all({row.name: row.shape for row in rows})
        self.tensors: Mapping[str, TensorInfo] = {
            name: tensor.info for name, tensor in self._pieced.items()
        }

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of a tensor, from the pieces that have it.

        Raises:
            CheckpointError: ranks that hold the same part hold different bytes (pieces.py).
        """
        return self._pieced[name].read(index)

    def identity(self) -> dict[str, Any]:
        """All files, and how a strategy file places what is in them."""
        files = {name: file.identity() for name, file in sorted(self.files.items())}
        if self._strategy is None:
            return {"files": files}
        placed = {name: [at.dev_matrix, at.tensor_map] for name, at in self._strategy.items()}
        text = json.dumps(placed, sort_keys=True)
        return {"files": files, "strategy_sha256": hashlib.sha256(text.encode()).hexdigest()}

    def check_sums(self, on_bytes: Callable[[int], object] = lambda _: None) -> tuple[str, ...]:
        """Compare each file with the checksum that it brings, if it does; then all of it is read.

        Returns:
            The files that bring none, of whose bytes nothing is known.

        Raises:
            CheckpointError: a file is not what its writer wrote.
        """
        return tuple(name for name, file in self.files.items() if not has_right_sum(file, on_bytes))

    def _join_all(self, shapes: Mapping[str, Shape]) -> dict[str, PiecedTensor]:
        joiner = PartJoiner(self.path, shapes, self._strategy or {})
        joined: dict[str, PiecedTensor] = {}
        for stored in common_names(self._ranks):
            files = [rank.places[stored] for rank in self._ranks]
            for name, tensor in joiner.join(stored, files):
                if name in joined:
                    raise CheckpointError(
                        f"{self.path} holds {name} twice, the second time as {stored}; keep one of them."
                    )
                joined[name] = tensor
        return joined
