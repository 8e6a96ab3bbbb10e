"""Layout: every tensor of a sharded checkpoint before it exists.

One abstract tree drives the byte counts of `plan`, the files of `prepare`, and what a rank expects
to load. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from parallel.checkpoint.source import DTYPE_BYTES, TensorInfo
from parallel.errors import CheckpointError
from parallel.model.config import ModelConfig
from parallel.model.families import DROPPED_SUFFIXES
from parallel.model.placements import HEAD, Row, Table, linear_modules, placement_table
from parallel.placement import Index, Shape, index_shape
from quant.scheme import QuantScheme

SCALE_SUFFIX = "_scale"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a shard file.

    Attributes:
        name: the row's name; a scale is called `<row>_scale`, as in compressed-tensors.
        row: the row of the placement table it belongs to.
        shape: its global shape.
        dtype: a torch name.
        is_quantized: part of a quantized weight, whose parts keep their dtype in memory.
    """

    name: str
    row: Row
    shape: Shape
    dtype: str
    is_quantized: bool = False

    def index(self, rank: int, size: int) -> Index:
        """The rank's slice. A scale [N, 1] is cut as its weight's rows are, and never along K."""
        cuts = self.row.index(rank, size)
        if self.shape == self.row.shape:
            return cuts
        return (cuts[0], slice(0, 1))

    def num_bytes(self, rank: int, size: int, float_dtype: str | None = None) -> int:
        """Bytes of the rank's slice as it is stored; in memory, where floats become another dtype."""
        dtype = float_dtype if float_dtype and not self.is_quantized else self.dtype
        return math.prod(index_shape(self.index(rank, size))) * DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class Layout:
    """The tensors of a model under a scheme.

    Attributes:
        table: the placement of each tensor.
        quantized: the names of the rows that are quantized.
        tensors: what a shard file holds, in the order of a step.
    """

    config: ModelConfig
    scheme: QuantScheme
    vocab_emb_dp: bool
    table: Table
    quantized: frozenset[str]
    tensors: tuple[StoredTensor, ...]

    def rank_bytes(self, rank: int, size: int, float_dtype: str | None = None) -> int:
        """Bytes of one rank's weights on disk, or in memory with floats of `float_dtype`."""
        return sum(tensor.num_bytes(rank, size, float_dtype) for tensor in self.tensors)


def make_layout(
    config: ModelConfig,
    scheme: QuantScheme,
    *,
    vocab_emb_dp: bool = False,
    dtype_of: Callable[[Row], str] | None = None,
) -> Layout:
    """Describe a model's shards.

    Args:
        dtype_of: the stored dtype of a tensor; the config's where there are no files to ask.

    Raises:
        QuantError: a pattern of modules_to_not_convert that matches nothing.
    """
    left_out = scheme.left_out(linear_modules(config)) if scheme.quantizes_weights else frozenset()
    own_head = scheme.quantizes_weights and "lm_head" not in left_out
    table = placement_table(config, vocab_emb_dp=vocab_emb_dp, own_head=own_head)
    quantized = frozenset(
        row.name
        for row in table.values()
        if scheme.quantizes_weights and row.is_linear and row.module not in left_out
    )
    dtype_of = dtype_of or (lambda _: config.dtype)
    tensors = [
        tensor
        for row in table.values()
        for tensor in _stored(row, dtype_of(row), row.name in quantized)
    ]
    return Layout(config, scheme, vocab_emb_dp, table, quantized, tuple(tensors))


def _stored(row: Row, dtype: str, is_quantized: bool) -> list[StoredTensor]:
    if not is_quantized:
        return [StoredTensor(row.name, row, row.shape, dtype)]
    return [
        StoredTensor(row.name, row, row.shape, "int8", is_quantized=True),
        StoredTensor(row.name + SCALE_SUFFIX, row, (row.shape[0], 1), dtype, is_quantized=True),
    ]


def check_source(table: Table, tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Compare a float checkpoint with the tensors that the model has.

    Raises:
        CheckpointError: a tensor that is missing, that is not the model's, or not of its shape.
    """
    check_names(table, tensors, where)
    for row in table.values():
        name = row.twin or row.name
        if tensors[name].shape != row.shape:
            raise CheckpointError(
                f"{where}: {name} must have shape {list(row.shape)} by config.json, but has "
                f"{list(tensors[name].shape)}; use the config.json of this checkpoint."
            )
        if tensors[name].dtype == "int8":
            raise CheckpointError(
                f"{where}: {name} is int8 without a scheme that says its scales; "
                "give the unquantized checkpoint."
            )


def check_names(table: Table, names: Iterable[str], where: str) -> None:
    """Compare a checkpoint's names with the model's.

    A tied lm_head may stand in the file as well; as in transformers, the embedding is used.
    """
    expected = {row.twin or row.name for row in table.values()}
    present = {name for name in names if not name.endswith(DROPPED_SUFFIXES)}
    missing = sorted(expected - present)
    if missing:
        raise CheckpointError(
            f"{where} lacks {len(missing)} tensors of the model, first {missing[0]}; "
            "download the checkpoint again, or use its own config.json."
        )
    extra = sorted(present - expected - {HEAD})
    if extra:
        raise CheckpointError(
            f"{where} has {len(extra)} tensors that the model does not know, first {extra[0]}; "
            "use the config.json of this checkpoint."
        )
