"""One tensor from its source to one rank: read, quantized if the layout says so, cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.checkpoint.layout import (
    SCALE_SUFFIX,
    Layout,
    input_scale_name,
    input_zero_point_name,
)
from parallel.checkpoint.layout_checks import uncalibrated
from parallel.checkpoint.source import Source
from parallel.errors import CheckpointError
from parallel.model.placements import Row
from parallel.placement import Index
from quant.methods.rtn import round_to_nearest
from quant.numeric import pack_int4
from quant.scheme import LinearScheme
from quant.weight import (
    NibbleWeight,
    QuantizedWeight,
    StoredWeight,
    Weight,
    input_scales,
    input_zero_points,
    unpacked,
)


def read_weight(layout: Layout, source: Source, row: Row, index: Index) -> Weight:
    """A slice of one tensor as the layout wants it; raises what `read_stored` does."""
    weight = read_stored(layout, source, row, index)
    return weight if isinstance(weight, Tensor) else unpacked(weight)


def read_stored(layout: Layout, source: Source, row: Row, index: Index) -> StoredWeight | Tensor:
    """A slice of one tensor as the layout wants it; int4 that is stored stays two values a byte.

    A weight that is quantized here is read by whole rows, whatever the slice: the scales of a
    row-parallel weight are those of the whole row, so the integers are the same at every size.

    Raises:
        CheckpointError: the weight holds an infinity or a NaN, and must be quantized; or a static scale
            of its input or of the KV cache is missing, or is none.
    """
    scheme = layout.schemes.get(row.name)
    if row.is_kv_scale:
        return _read_kv_scale(source, row, index)
    if scheme is None:
        return source.read(source_name(source, row), index)
    if is_quantized(source, row):
        return _read_quantized(layout, source, row, index)
    if scheme.is_static:
        raise uncalibrated(row, str(source.path))
    return _quantize(scheme, source, row, index)


def weight_parts(row: Row, weight: Weight) -> dict[str, Tensor]:
    """A weight as it is stored: name -> tensor; int4 as two values a byte.

    A static input's zero point is always said; the layout knows whether it is stored.
    """
    if not isinstance(weight, QuantizedWeight):
        return {row.name: weight}
    values = pack_int4(weight.values_NK) if weight.bits == 4 else weight.values_NK
    parts = {row.name: values, row.name + SCALE_SUFFIX: weight.scale_NG}
    if weight.input_scale is not None:
        parts[input_scale_name(row)] = weight.input_scale
        zero_point = torch.tensor([weight.input_zero_point], dtype=torch.int8)
        parts[input_zero_point_name(row)] = zero_point
    return parts


def check_inputs(
    source: Source, rows: Sequence[Row], weights: Sequence[StoredWeight | Tensor]
) -> None:
    """Raise CheckpointError where the parts of one product would round their one input differently."""
    quantized = [weight for weight in weights if not isinstance(weight, Tensor)]
    for what, name_of, found in (
        ("scales", input_scale_name, input_scales(quantized)),
        ("zero points", input_zero_point_name, input_zero_points(quantized)),
    ):
        if len(set(found)) > 1:
            names = ", ".join(name_of(row) for row in rows)
            raise CheckpointError(
                f"{source.path}: {names} must be equal, as they are {what} of one input, but are "
                f"{', '.join(f'{value:.6g}' for value in found)}; calibrate them together."
            )


def source_name(source: Source, row: Row) -> str:
    """A tied head's own copy in the file is not the model's: as in transformers, the embedding is."""
    return row.name if is_quantized(source, row) else row.twin or row.name


def is_quantized(source: Source, row: Row) -> bool:
    """Whether the source, a prepared one, holds the weight quantized already."""
    return row.name + SCALE_SUFFIX in source.tensors


def _read_kv_scale(source: Source, row: Row, index: Index) -> Tensor:
    scale = source.read(row.name, index).float()
    if not (scale.isfinite() & (scale > 0)).all():
        raise CheckpointError(
            f"{source.path}: {row.name} must hold positive finite scales, but does not; calibrate again."
        )
    return scale


def _read_quantized(layout: Layout, source: Source, row: Row, index: Index) -> StoredWeight:
    """From a prepared source: what `weight_parts` made of it, whatever size it was cut for."""
    scheme = layout.schemes[row.name]
    stored, scale_NG, *more = (
        source.read(part.name, part.cut(index)) for part in layout.parts[row.name]
    )
    input_scale = _checked_scale(source, row, more[0]) if more else None
    zero_point = int(more[1]) if layout.has_zero_point(row) else 0
    columns = index[1]
    shape = (len(stored), columns.stop - columns.start)
    is_int4 = scheme.bits == 4
    first_column = columns.start % scheme.group_size if scheme.group_size else 0
    weight = QuantizedWeight(
        torch.empty(shape, dtype=torch.int8, device="meta") if is_int4 else stored,
        scale_NG,
        scheme.activation_dtype,
        scheme.bits,
        scheme.group_size,
        first_column,
        input_scale,
        zero_point,
    )
    return NibbleWeight(stored, weight) if is_int4 else weight


def _checked_scale(source: Source, row: Row, scale: Tensor) -> Tensor:
    if not (torch.isfinite(scale) & (scale > 0)).all():
        raise CheckpointError(
            f"{source.path}: {input_scale_name(row)} must be a finite number above zero, but is "
            f"{scale.item()}; calibrate again."
        )
    return scale


def _quantize(scheme: LinearScheme, source: Source, row: Row, index: Index) -> QuantizedWeight:
    name = source_name(source, row)
    whole_rows = (index[0], slice(0, row.shape[1]))
    try:
        full = round_to_nearest(source.read(name, whole_rows), scheme)
    except ValueError as error:
        raise CheckpointError(
            f"{source.path}: {name} cannot be quantized, {error}; name its module in "
            "quant.modules_to_not_convert, or download it again."
        ) from error
    return full.columns(index[1].start, index[1].stop)
