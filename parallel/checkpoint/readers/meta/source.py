"""Meta's own directory as a source: `params.json` and `consolidated.NN.pth`, by Hugging Face's names.

Meta turns neighbouring entries of a head together, Hugging Face the two halves of it, so the rows of
wq and wk stand in another order, head by head: `permute` of convert_llama_weights_to_hf.py, undone
here for the heads that a slice touches and no others.

Shapes: N rows, H heads, D half the entries of a head, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.readers.huggingface import has_weights
from parallel.checkpoint.readers.meta.config import PARAMS
from parallel.checkpoint.readers.meta.files import PATTERN, ConsolidatedFiles
from parallel.checkpoint.source import TensorInfo
from parallel.errors import CheckpointError
from parallel.model.config import ModelConfig
from parallel.model.placements import placement_table
from parallel.placement import Index

if TYPE_CHECKING:
    from torch import Tensor

_TURNED = (".q_proj.weight", ".k_proj.weight")


class MetaSource:
    """The tensors of a directory as Meta publishes it.

    Args:
        config: the model, by params.json or by a config.json beside it.

    Raises:
        CheckpointError: what ConsolidatedFiles raises, or parts that do not add up to the shapes of
            the config.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.path = path
        self._head_dim = config.head_dim
        self._files = ConsolidatedFiles(path)
        self.tensors: Mapping[str, TensorInfo] = self._files.tensors
        self._check_shapes(config)

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of a tensor; of wq and wk, all rows of the heads it touches are read."""
        if not name.endswith(_TURNED):
            return self._files.read(name, index)
        rows, columns = index
        first, last = rows.start // self._head_dim, -(-rows.stop // self._head_dim)
        heads = slice(first * self._head_dim, last * self._head_dim)
        turned_NC = turn_heads(self._files.read(name, (heads, columns)), self._head_dim)
        return turned_NC[rows.start - heads.start : rows.stop - heads.start]

    def identity(self) -> dict[str, Any]:
        return self._files.identity()

    def _check_shapes(self, config: ModelConfig) -> None:
        """A file that is missing shows in the first tensor that was cut."""
        for row in placement_table(config, own_head=True).values():
            found = self.tensors.get(row.name)
            if found is not None and found.shape != row.shape:
                raise CheckpointError(
                    f"{self.path}: the {len(self._files.files)} consolidated files add up to "
                    f"{list(found.shape)} for {row.name}, but the config asks for "
                    f"{list(row.shape)}; download all files of the model, and its own config."
                )


def is_meta(path: Path) -> bool:
    """Whether a directory holds Meta's files, and none of Hugging Face's, which are read first."""
    has_files = (path / PARAMS).exists() and any(path.glob(PATTERN))
    return has_files and not has_weights(path)


def turn_heads(rows_NC: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads, from pairs of neighbours to pairs across the halves of a head."""
    num_rows, num_columns = rows_NC.shape
    pairs_HD2C = rows_NC.view(num_rows // head_dim, head_dim // 2, 2, num_columns)
    return pairs_HD2C.transpose(1, 2).reshape(num_rows, num_columns)
