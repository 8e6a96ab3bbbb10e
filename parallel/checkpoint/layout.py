"""Layout: every tensor of a sharded checkpoint before it exists.

One abstract tree drives the byte counts of `plan`, the files of `prepare`, and what a rank expects
to load. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from parallel.checkpoint.source import DTYPE_BYTES
from parallel.errors import ModelError
from parallel.model.config import ModelConfig
from parallel.model.parameters import Parameter, check_fused, parameters
from parallel.model.placements import (
    EMBEDDING,
    HEAD,
    Row,
    Table,
    linear_modules,
    placement_table,
)
from parallel.placement import Index, Shape, Split, index_shape
from quant.errors import QuantError
from quant.scheme import LinearScheme, QuantScheme

T = TypeVar("T")

SCALE_SUFFIX = "_scale"
# What compressed-tensors calls the scale of static activations: `<module>.input_scale`.
INPUT_SCALE = "input_scale"
# And its zero point, where the files have one.
INPUT_ZERO_POINT = "input_zero_point"
# int4 lies on disk as two values a byte.
STORED_DTYPES: Mapping[str, str] = {"int8": "int8", "int4": "uint8"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a shard file.

    Attributes:
        name: the row's name; a scale is called `<row>_scale`, and that of a static input
            `<module>.input_scale`, as in compressed-tensors, its zero point `<module>.input_zero_point`.
        row: the row of the placement table it belongs to.
        shape: its global shape.
        dtype: a torch name.
        is_quantized: part of a quantized weight, whose parts keep their dtype in memory.
        columns: how many columns of the row one entry stands for: two of int4, which a byte holds;
            a group of them, or all, in a scale.
        is_whole: every rank has all of it, whatever its slice of the row.
    """

    name: str
    row: Row
    shape: Shape
    dtype: str
    is_quantized: bool = False
    columns: int = 1
    is_whole: bool = False

    def index(self, rank: int, size: int) -> Index:
        """The rank's slice of this tensor."""
        return self.cut(self.row.index(rank, size))

    def cut(self, index: Index) -> Index:
        """The entries that a slice of the row's weight needs; a scale at its ends may be shared."""
        if self.is_whole:
            return tuple(slice(0, length) for length in self.shape)
        if not self.is_quantized:
            return index
        rows, columns = index
        if self.columns >= self.row.shape[1]:
            return rows, slice(0, 1)
        assert self.dtype != "uint8" or columns.start % self.columns == 0, (self.name, columns)
        return rows, slice(columns.start // self.columns, -(-columns.stop // self.columns))

    def num_bytes(self, rank: int, size: int, float_dtype: str | None = None) -> int:
        """Bytes of the rank's slice as it is stored; in memory, where floats become another dtype."""
        keeps_dtype = self.is_quantized or self.row.is_kv_scale
        dtype = float_dtype if float_dtype and not keeps_dtype else self.dtype
        return math.prod(index_shape(self.index(rank, size))) * DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class Layout:
    """The tensors of a model under a scheme.

    Attributes:
        table: the placement of each tensor.
        schemes: of each row that is quantized, by name.
        parts: what a shard file holds of each row, by its name, in the order of a step.
    """

    config: ModelConfig
    scheme: QuantScheme
    vocab_emb_dp: bool
    table: Table
    schemes: Mapping[str, LinearScheme]
    parts: Mapping[str, tuple[StoredTensor, ...]]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """All that a shard file holds."""
        return tuple(tensor for parts in self.parts.values() for tensor in parts)

    @cached_property
    def kinds(self) -> tuple[tuple[StoredTensor, int], ...]:
        """A tensor of each kind, and how many are like it: 126 layers hold what one does, 126 times.

        What a rank holds of a tensor depends on shapes and placements, not on names; the embedding
        and lm_head are kinds of their own.
        """
        return _kinds(self.tensors, _kind)

    @cached_property
    def parameter_kinds(self) -> tuple[tuple[Parameter, int], ...]:
        """Likewise of what a rank holds in memory, where schemes differ in how they are packed too."""

        def key(parameter: Parameter) -> Any:
            names = [row.name for row in parameter.rows]
            kinds = (_kind(part) for name in names for part in self.parts[name])
            return self.schemes.get(names[0]), *kinds

        return _kinds(parameters(self.table), key)

    @property
    def labels(self) -> tuple[str, ...]:
        """The short names of the schemes in it, each once."""
        return tuple(dict.fromkeys(scheme.label for scheme in self.schemes.values()))

    def has_zero_point(self, row: Row) -> bool:
        """Whether the static input of a row's product is asymmetric."""
        return any(part.name == input_zero_point_name(row) for part in self.parts[row.name])

    def rank_bytes(self, rank: int, size: int, float_dtype: str | None = None) -> int:
        """Bytes of one rank's weights on disk, or in memory with floats of `float_dtype`."""
        return sum(
            count * tensor.num_bytes(rank, size, float_dtype) for tensor, count in self.kinds
        )

    def check_tp(self, tp: int) -> None:
        """Raise ModelError unless the model can be dealt out to `tp` ranks, each of which gets some."""
        self.config.check_tp(tp)
        if tp in (valid := self.valid_tp_sizes()):
            return
        row, num_units = self.least_units()
        raise ModelError(
            f"`parallel.tp` must be at most {num_units}, into which {row.name} "
            f"({'x'.join(map(str, row.shape))}) can be cut, or a rank would get nothing, but is {tp}; "
            f"valid sizes: {', '.join(map(str, valid))}."
        )

    def valid_tp_sizes(self) -> tuple[int, ...]:
        """The tensor-parallel sizes that this model, quantized so, can be split by."""
        _, most = self.least_units()
        return tuple(tp for tp in self.config.valid_tp_sizes() if tp <= most)

    def least_units(self) -> tuple[Row, int]:
        """The row that can be dealt out among the fewest ranks, and among how many."""
        return min(self._units(), key=lambda found: found[1])

    def check_exact_sums(self, exact_sums: bool | None) -> None:
        """Raise QuantError where exact sums are asked for and a scale belongs to a group."""
        grouped = [name for name, scheme in self.schemes.items() if scheme.group_size is not None]
        if exact_sums and grouped:
            raise QuantError(
                f"`parallel.exact_sums` is true, but {grouped[0]} has a scale for each group of "
                "columns, so its partial sums are no integers once they are added up; leave it out, "
                "or quantize per channel."
            )

    def _units(self) -> list[tuple[Row, int]]:
        """The rows that are dealt out, and among how many ranks at most."""
        return [
            (row, row.placement.num_units(row.shape))
            for row in self.table.values()
            if isinstance(row.placement, Split)
        ]


def make_layout(
    config: ModelConfig,
    scheme: QuantScheme,
    *,
    vocab_emb_dp: bool = False,
    dtype_of: Callable[[Row], str] | None = None,
    has_zero_point: Callable[[Row], bool] = lambda _: False,
) -> Layout:
    """Describe a model's shards.

    Args:
        dtype_of: the stored dtype of a tensor; the config's where there are no files to ask.
        has_zero_point: whether the files have one for the static input of a linear. Like dtypes it is
            theirs to say, and no part of a scheme: what is calibrated here has none.

    Raises:
        QuantError: a pattern of the scheme that matches nothing, or parts of one product whose
            schemes differ.
    """
    modules = scheme.for_modules(linear_modules(config))
    check_fused(modules)
    own_head = modules[HEAD.removesuffix(".weight")] is not None
    table = placement_table(
        config,
        vocab_emb_dp=vocab_emb_dp,
        own_head=own_head,
        schemes=modules,
        has_kv_scales=scheme.kv_granularity == "per_channel",
    )
    schemes = {
        row.name: found
        for row in table.values()
        if row.is_linear and (found := modules[row.module]) is not None
    }
    dtype_of = dtype_of or (lambda _: config.dtype)
    parts = {
        row.name: _stored(row, dtype_of(row), schemes.get(row.name), has_zero_point)
        for row in table.values()
    }
    return Layout(config, scheme, vocab_emb_dp, table, schemes, parts)


def _kinds(items: Iterable[T], key_of: Callable[[T], Any]) -> tuple[tuple[T, int], ...]:
    """The first of each kind, and how many there are."""
    found: dict[Any, tuple[T, int]] = {}
    for item in items:
        key = key_of(item)
        first, count = found.get(key, (item, 0))
        found[key] = first, count + 1
    return tuple(found.values())


def _kind(tensor: StoredTensor) -> StoredTensor:
    """The tensor without what tells it from those that are alike."""
    name = tensor.row.name if tensor.row.name in (EMBEDDING, HEAD) else ""
    return replace(tensor, name="", row=replace(tensor.row, name=name))


def _stored(
    row: Row, dtype: str, scheme: LinearScheme | None, has_zero_point: Callable[[Row], bool]
) -> tuple[StoredTensor, ...]:
    if scheme is None:
        return (StoredTensor(row.name, row, row.shape, "float32" if row.is_kv_scale else dtype),)
    parts: tuple[StoredTensor, ...] = (
        _part(row, row.name, STORED_DTYPES[scheme.weight_dtype], scheme.values_per_byte),
        _part(row, row.name + SCALE_SUFFIX, dtype, scheme.group_size or row.shape[1]),
    )
    if not scheme.is_static:
        return parts
    parts = *parts, _of_input(row, input_scale_name(row), "float32")
    if not has_zero_point(row):
        return parts
    return *parts, _of_input(row, input_zero_point_name(row), "int8")


def _of_input(row: Row, name: str, dtype: str) -> StoredTensor:
    return StoredTensor(name, row, (1,), dtype, is_quantized=True, is_whole=True)


def input_scale_name(row: Row) -> str:
    """What the scale of a linear's static input is called."""
    return f"{row.module}.{INPUT_SCALE}"


def input_zero_point_name(row: Row) -> str:
    """What the zero point of a linear's static input is called."""
    return f"{row.module}.{INPUT_ZERO_POINT}"


def _part(row: Row, name: str, dtype: str, columns: int) -> StoredTensor:
    shape = (row.shape[0], -(-row.shape[1] // columns))
    return StoredTensor(name, row, shape, dtype, is_quantized=True, columns=columns)
