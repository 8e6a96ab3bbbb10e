"""What the parts of a linear hold, where it decides what is computed.

Here a product is `input_scale * (q @ values.T) * weight_scale` with `q = clamp(round(x / input_scale))`,
in a range that a zero point of the input moves: there is no place in it for a zero point of the weight,
a factor of each input channel, or another order of them. What would change nothing, such as zero points
that are zero, is accepted.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.readers.golden_stick.names import (
    INPUT_SCALE,
    ORDER,
    PRODUCT_SCALE,
    SCALE,
    SHIFT,
    SMOOTH,
    WEIGHT,
    ZERO,
)
from parallel.checkpoint.readers.golden_stick.parts import LinearParts, StoredPart, whole_index
from parallel.checkpoint.readers.golden_stick.scales import CLOSE, REMEDY, as_floats, input_scale
from parallel.checkpoint.readers.golden_stick.zero_point import check_correction
from parallel.errors import CheckpointError
from parallel.placement import Index
from quant.numeric import pack_int4, unpack_int4

_NEUTRAL = {
    ZERO: (0, "zero points of its weight"),
    SHIFT: (0, "a shift of its input (outlier-suppression+)"),
    SMOOTH: (1, "factors of its input channels (smoothing when it runs)"),
}


def check_linear(parts: LinearParts, path: Path) -> None:
    """Raises CheckpointError for a value that a product here could not carry."""
    for kind, (value, what) in _NEUTRAL.items():
        if kind in parts and not bool((parts[kind].whole() == value).all()):
            raise CheckpointError(
                f"{path}: {parts[kind].stored} holds {what}, which must all be {value} to be computed "
                f"here, but are not; {REMEDY}"
            )
    if parts.scheme.is_static:
        check_correction(parts, path)
    if ORDER in parts:
        _check_order(parts[ORDER], path)
    for kind in (SCALE, PRODUCT_SCALE):
        if kind in parts:
            _check_equal(parts, kind, path)
    scale = weight_scale(parts, whole_index((parts.shape[0], parts.num_groups)))
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        stored = parts[SCALE if SCALE in parts else PRODUCT_SCALE].stored
        raise CheckpointError(
            f"{path}: {stored} must hold finite scales that are not negative, but does not; quantize "
            "the checkpoint again."
        )
    if SCALE in parts and PRODUCT_SCALE in parts:
        _check_product(parts, path)


def weight_scale(parts: LinearParts, index: Index) -> Tensor:
    """A slice of [out, groups], as it is stored, or the scale of the product divided by the input's."""
    rows, groups = index
    if parts.scheme.group_size is not None:
        return parts.read(SCALE, (groups, rows)).T.contiguous()
    if SCALE in parts:
        return parts.read(SCALE, (rows,)).unsqueeze(1)
    return (as_floats(parts[PRODUCT_SCALE]) / input_scale(parts))[rows].unsqueeze(1)


def transposed(parts: LinearParts, index: Index) -> Tensor:
    """A slice of 4-bit integers as they are stored here: [out, in / 2] from their [in, out / 2]."""
    rows, columns = index
    inputs = slice(2 * columns.start, min(2 * columns.stop, parts.shape[1]))
    outputs = slice(rows.start // 2, -(-rows.stop // 2))
    stored = parts.read(WEIGHT, (inputs, outputs)).contiguous().view(torch.uint8)
    values_KN = unpack_int4(stored, 2 * (outputs.stop - outputs.start))
    first = rows.start - 2 * outputs.start
    wanted = values_KN[:, first : first + rows.stop - rows.start]
    return pack_int4(wanted.T.contiguous())


def _check_order(stored: StoredPart, path: Path) -> None:
    for piece in stored.tensor.pieces:
        found = piece.read(piece.place)
        if not torch.equal(found.long(), torch.arange(len(found))):
            raise CheckpointError(
                f"{path}: {stored.stored} says that the input channels are in another order, in which "
                f"they cannot be computed here; {REMEDY}"
            )


def _check_equal(parts: LinearParts, kind: str, path: Path) -> None:
    """The scales of a row are those of the whole row on every rank."""
    if not (parts.is_row_parallel and parts[kind].by_rank):
        return
    first, *others = parts[kind].replicas()
    for rank, other in enumerate(others, 1):
        if not torch.equal(other, first):
            raise CheckpointError(
                f"{path}: {parts[kind].stored} must be equal on all ranks, but differs on rank {rank}: "
                "each rank has scaled its own part of the rows, while here a row that ranks share has "
                f"one scale; {REMEDY}"
            )


def _check_product(parts: LinearParts, path: Path) -> None:
    product = as_floats(parts[PRODUCT_SCALE])
    expected = input_scale(parts) * parts[SCALE].whole().float()
    if not bool(((product - expected).abs() <= CLOSE * expected).all()):
        raise CheckpointError(
            f"{path}: {parts[PRODUCT_SCALE].stored} must be {parts[INPUT_SCALE].stored} times "
            f"{parts[SCALE].stored}, but is not; quantize the checkpoint again."
        )
