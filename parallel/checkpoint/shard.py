"""One tensor from its source to one rank: read, quantized if the layout says so, cut."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from parallel.checkpoint.layout import SCALE_SUFFIX, Layout
from parallel.checkpoint.source import Source
from parallel.errors import CheckpointError
from parallel.model.placements import Row
from parallel.placement import Index
from quant.methods.rtn import round_to_nearest
from quant.weight import QuantizedWeight, Weight


def read_weight(layout: Layout, source: Source, row: Row, index: Index) -> Weight:
    """A slice of one tensor as the layout wants it.

    A weight that is quantized here is read by whole rows, whatever the slice: the scale of a
    row-parallel weight is that of the whole row, so the integers are the same at every size.

    Raises:
        CheckpointError: the weight holds an infinity or a NaN, and must be quantized.
    """
    if row.name not in layout.quantized:
        return source.read(source_name(source, row), index)
    if is_quantized(source, row):
        scale_N = source.read(row.name + SCALE_SUFFIX, (index[0], slice(0, 1)))
        return QuantizedWeight(
            source.read(row.name, index), scale_N, layout.scheme.activation_dtype
        )
    return _quantize(layout, source, row, index)


def weight_parts(row: Row, weight: Weight) -> dict[str, Tensor]:
    """A weight as it is stored: name -> tensor."""
    if isinstance(weight, QuantizedWeight):
        return {row.name: weight.values_NK, row.name + SCALE_SUFFIX: weight.scale_N}
    return {row.name: weight}


def source_name(source: Source, row: Row) -> str:
    """A tied head's own copy in the file is not the model's: as in transformers, the embedding is."""
    return row.name if is_quantized(source, row) else row.twin or row.name


def is_quantized(source: Source, row: Row) -> bool:
    """Whether the source, a prepared one, holds the weight quantized already."""
    return row.name + SCALE_SUFFIX in source.tensors


def _quantize(layout: Layout, source: Source, row: Row, index: Index) -> QuantizedWeight:
    name = source_name(source, row)
    whole_rows = (index[0], slice(0, row.shape[1]))
    try:
        full = round_to_nearest(source.read(name, whole_rows), layout.scheme)
    except ValueError as error:
        raise CheckpointError(
            f"{source.path}: {name} cannot be quantized, {error}; name its module in "
            "quant.modules_to_not_convert, or download it again."
        ) from error
    return replace(full, values_NK=full.values_NK[:, index[1]].contiguous())
