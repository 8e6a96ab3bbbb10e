"""Quantize and dequantize as pure functions.

The rule is symmetric round-to-nearest as in Golden Stick and compressed-tensors: with M the largest
absolute value of a channel or of a group of its columns, `scale = 2 M / (2^bits - 1)`,
`q = clamp(round(w / scale), -2^(bits - 1), 2^(bits - 1) - 1)`. It is computed in float32 whatever
the dtype of the weight, and from the *stored* scale, so that a scale kept in 16 bits multiplies back
exactly what was divided by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_MIN, INT8_MAX = -128, 127
# Rows are converted a block at a time, in a buffer that stays in cache: the float32 copy of a 70B's
# weight (0.9 GB) never is.
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Grid:
    """The integers that a weight is rounded to.

    Attributes:
        bits: 8 or 4.
        group_size: columns that share a scale; None: all of a row do. A last group may be short.
    """

    bits: int = 8
    group_size: int | None = None

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1


INT8 = Grid()


def channel_scale(weight_NK: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """The int8 scale of each output channel.

    Args:
        weight_NK: [out_features, in_features], a floating dtype.
        scale_dtype: the dtype the scale is stored in; the checkpoint's own.

    Returns:
        [out_features, 1] in `scale_dtype`, positive and finite. An all-zero channel gets 1, and a
        scale that `scale_dtype` would round to zero becomes its smallest positive value.
    """
    highest_N, lowest_N = weight_NK.amax(dim=1, keepdim=True), weight_NK.amin(dim=1, keepdim=True)
    amax_N = torch.maximum(highest_N, -lowest_N).float()
    scale_N = (amax_N * (2.0 / 255.0)).to(scale_dtype)
    limits = torch.finfo(scale_dtype)
    scale_N = scale_N.clamp(min=limits.smallest_normal * limits.eps)
    return torch.where(amax_N == 0, torch.ones_like(scale_N), scale_N)


def quantize_per_channel(
    weight_NK: Tensor, scale_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize a weight to int8 with a scale for each output channel, rounding ties to even.

    Args:
        weight_NK: [out_features, in_features]; a row must be whole, or its scale would depend on
            how many ranks share it.
        scale_dtype: dtype of the stored scale; the weight's own if None.

    Returns:
        int8 [out_features, in_features] and scale [out_features, 1].

    Raises:
        ValueError: the weight holds an infinity or a NaN.
    """
    scale_dtype = scale_dtype or weight_NK.dtype
    quantized_NK = torch.empty(weight_NK.shape, dtype=torch.int8)
    scale_N = torch.empty(weight_NK.shape[0], 1, dtype=scale_dtype)
    blocks = row_blocks(weight_NK)
    # One buffer for all blocks: it stays in cache, and the weight itself is never written to.
    buffer_BK = torch.empty((blocks[0].stop if blocks else 0), weight_NK.shape[1])
    for rows in blocks:
        wide_BK = buffer_BK[: rows.stop - rows.start].copy_(weight_NK[rows])
        scale_N[rows] = channel_scale(wide_BK, scale_dtype)
        if not torch.isfinite(scale_N[rows]).all():
            raise ValueError("the weight holds an infinity or a NaN")
        wide_BK.div_(scale_N[rows].float()).round_().clamp_(INT8_MIN, INT8_MAX)
        quantized_NK[rows] = wide_BK
    return quantized_NK, scale_N


def weight_scale(weight_NK: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Tensor:
    """The scale of each group of each row, [out_features, groups]; rules as for channel_scale."""
    highest_NG = _by_group(weight_NK, grid).abs().amax(dim=2).float()
    scale_NG = (highest_NG * (2.0 / (2**grid.bits - 1))).to(scale_dtype)
    limits = torch.finfo(scale_dtype)
    scale_NG = scale_NG.clamp(min=limits.smallest_normal * limits.eps)
    return torch.where(highest_NG == 0, torch.ones_like(scale_NG), scale_NG)


def quantize(
    weight_NK: Tensor,
    grid: Grid,
    scale_dtype: torch.dtype | None = None,
    scale_NG: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Round a weight to a grid, ties to even.

    Args:
        weight_NK: [out_features, in_features]; whole rows.
        scale_dtype: dtype of the stored scale; the weight's own if None.
        scale_NG: the scale, where it is known already.

    Returns:
        int8 [out_features, in_features] within the grid, and scale [out_features, groups].

    Raises:
        ValueError: the weight holds an infinity or a NaN.
    """
    values_NK = torch.empty(weight_NK.shape, dtype=torch.int8)
    scales = []
    for rows in row_blocks(weight_NK):
        wide_BK = weight_NK[rows].float()
        scale_BG = (
            weight_scale(wide_BK, grid, scale_dtype or weight_NK.dtype)
            if scale_NG is None
            else scale_NG[rows]
        )
        if not (torch.isfinite(scale_BG).all() and torch.isfinite(wide_BK).all()):
            raise ValueError("the weight holds an infinity or a NaN")
        wide_BK = wide_BK / _by_column(scale_BG, grid.group_size, weight_NK.shape[1])
        values_NK[rows] = wide_BK.round_().clamp_(grid.low, grid.high)
        scales.append(scale_BG)
    return values_NK, torch.cat(scales)


def dequantize(
    values_NK: Tensor,
    scale_NG: Tensor,
    dtype: torch.dtype,
    group_size: int | None = None,
    first_column: int = 0,
) -> Tensor:
    """`values * scale`, multiplied in float32, as `dtype`.

    Args:
        group_size: columns that share a scale; None: all do.
        first_column: which column of the whole row the first one is.
    """
    scale_NK = _by_column(scale_NG, group_size, values_NK.shape[1], first_column)
    return (values_NK.float() * scale_NK).to(dtype)


def _by_group(weight_NK: Tensor, grid: Grid) -> Tensor:
    """[N, groups, group_size]; a short last group is filled with zeros."""
    size = grid.group_size or weight_NK.shape[1]
    missing = -weight_NK.shape[1] % size
    return (F.pad(weight_NK, (0, missing)) if missing else weight_NK).unflatten(1, (-1, size))


def _by_column(
    scale_NG: Tensor, group_size: int | None, num_columns: int, first_column: int = 0
) -> Tensor:
    """float32: each column's scale, [N, columns] or, where a row has one, [N, 1]."""
    if group_size is None:
        return scale_NG.float()
    groups = torch.arange(first_column, first_column + num_columns) // group_size
    return scale_NG.float()[:, groups]


def row_blocks(weight_NK: Tensor) -> list[slice]:
    """Slices of rows whose float32 copy has about BLOCK_BYTES."""
    num_rows, row_size = weight_NK.shape
    step = max(1, BLOCK_BYTES // (4 * max(1, row_size)))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
