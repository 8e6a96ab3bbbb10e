"""The zero point of a linear's static input, and what it adds to the product, which is not stored here.

Golden Stick's operator multiplies `round(x / scale + zero point)`, so that every sum is too large by the
zero point times the sum of the weight's row. What makes up for that stands in the files: as integers
beside the weight, or, times the scale of the product, as a bias; where the model has a bias of its own,
added to it. Here the zero point is taken off each integer (quant/activations.py), and the rest must be
what it is there for, or is taken off the bias again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.readers.golden_stick.names import CORRECTION, INPUT_ZERO, WEIGHT
from parallel.checkpoint.readers.golden_stick.parts import LinearParts, StoredPart
from parallel.checkpoint.readers.golden_stick.scales import CLOSE, REMEDY, product_scale
from parallel.errors import CheckpointError
from quant.activations import STATIC_HIGHEST, STATIC_LOWEST

# Half the smallest float16, to which a bias near zero is rounded.
_LEAST = 2.0**-25


def input_zero_point(parts: LinearParts) -> int:
    """The files have one of each channel where an operator of theirs wants that.

    Raises:
        CheckpointError: they differ, or are no integers of 8 bits.
    """
    stored = parts[INPUT_ZERO]
    found = stored.whole().double()
    lowest, highest = float(found.min()), float(found.max())
    if not (found == lowest).all():
        raise CheckpointError(
            f"{stored.info.file}: {stored.stored} must be one zero point for all channels of the input, "
            f"but they differ from {lowest:.6g} to {highest:.6g}; {REMEDY}"
        )
    if not (STATIC_LOWEST <= lowest <= STATIC_HIGHEST and lowest.is_integer()):
        raise CheckpointError(
            f"{stored.info.file}: {stored.stored} must be an integer of 8 bits (-128 to 127), but is "
            f"{lowest:.6g}; calibrate again."
        )
    return int(lowest)


def check_correction(parts: LinearParts, path: Path) -> None:
    """Raise CheckpointError where the zero point is none, or is not the one that was made up for.

    Of the first and the last output channel, as whoever reads a part of a weight reads no more of it;
    of all where there is nothing to make up for.
    """
    zero_point = input_zero_point(parts)
    if CORRECTION not in parts:
        return
    stored = parts[CORRECTION]
    last = parts.shape[0] - 1
    ends = (slice(0, 1), slice(last, last + 1)) if zero_point else (slice(0, last + 1),)
    for rows in ends:
        if not _is_right(_found(stored, rows), _added(parts, zero_point, rows), parts, rows):
            raise CheckpointError(
                f"{path}: {stored.stored} must hold what makes up for the zero point {zero_point} of "
                f"{parts[INPUT_ZERO].stored}, but does not; quantize the checkpoint again."
            )


def has_corrected_bias(parts: LinearParts) -> bool:
    """Whether the bias of the model, if it has one, has been added to."""
    return parts.scheme.is_static and CORRECTION not in parts


def original_bias(parts: LinearParts, stored_N: Tensor, rows: slice) -> Tensor:
    """The bias of some output channels as it was before, in the dtype in which it is stored.

    Whole rows of the weight are read for it.
    """
    zero_point = input_zero_point(parts)
    if zero_point == 0:
        return stored_N
    added_N = _added(parts, zero_point, rows) * product_scale(parts)[rows]
    return (stored_N.double() + added_N).to(stored_N.dtype)


def _added(parts: LinearParts, zero_point: int, rows: slice) -> Tensor:
    """int64: by how much the integer sums of whole rows are too large."""
    if zero_point == 0:
        return torch.zeros(rows.stop - rows.start, dtype=torch.int64)
    values_NK = parts.read(WEIGHT, (rows, slice(0, parts.shape[1])))
    return values_NK.sum(dim=1, dtype=torch.int64) * zero_point


def _found(stored: StoredPart, rows: slice) -> list[Tensor]:
    """What each rank has, where all have the whole; else what they have together."""
    return [tensor.read((rows,)) for tensor in stored.by_rank or (stored.tensor,)]


def _is_right(found: Sequence[Tensor], added_N: Tensor, parts: LinearParts, rows: slice) -> bool:
    """Integers may be each rank's own, of its part of the rows, or the whole's on one rank or on all."""
    if not found[0].is_floating_point():
        alike = all(torch.equal(part.long(), -added_N) for part in found)
        return alike or torch.equal(torch.stack(list(found)).long().sum(dim=0), -added_N)
    wanted_N = -added_N * product_scale(parts)[rows]
    limit_N = 2 * CLOSE * wanted_N.abs() + _LEAST
    return all(bool(((part.double() - wanted_N).abs() <= limit_N).all()) for part in found)
