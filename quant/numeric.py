"""Quantize and dequantize as pure functions.

The rule is symmetric round-to-nearest as in Golden Stick and compressed-tensors: with M the largest
absolute value of a channel, or of a group of its columns, `scale = 2 M / (2 ** bits - 1)` and
`q = clamp(round(w / scale))`, int8 within [-128, 127], int4 within [-8, 7]. It is computed in
float32 whatever the dtype of the weight, and from the *stored* scale, so that a scale kept in 16
bits multiplies back exactly what was divided by it.

Shapes: N out_features, K in_features, G groups of columns (1 for a whole row), S columns of a
group, B rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows are converted a block at a time, in a buffer that stays in cache: the float32 copy of a 70B's
# weight (0.9 GB) never is.
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Grid:
    """The integers of a weight.

    Attributes:
        bits: 8 or 4.
        group_size: columns that share a scale; None: a whole row does. A last group may be short.
    """

    bits: int = 8
    group_size: int | None = None

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def steps(self) -> int:
        """Steps between the lowest and the highest: what twice the largest value is divided by."""
        return 2**self.bits - 1

    def num_groups(self, in_features: int) -> int:
        return 1 if self.group_size is None else -(-in_features // self.group_size)


def weight_scale(weight_NK: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Tensor:
    """The scale of each group of each output channel.

    Args:
        weight_NK: [out_features, in_features], a floating dtype.
        scale_dtype: the dtype the scale is stored in; the checkpoint's own.

    Returns:
        [N, G] in `scale_dtype`, positive and finite. An all-zero group gets 1, and a scale that
        `scale_dtype` would round to zero becomes its smallest positive value.
    """
    size = _group_width(grid, weight_NK.shape[1])
    missing = -weight_NK.shape[1] % size
    padded_NK = F.pad(weight_NK, (0, missing)) if missing else weight_NK
    return _scale(padded_NK.unflatten(1, (-1, size)), grid, scale_dtype)


def quantize(
    weight_NK: Tensor,
    grid: Grid,
    scale_dtype: torch.dtype | None = None,
    scale_NG: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize a weight, rounding ties to even.

    Args:
        weight_NK: [out_features, in_features]; a row must be whole, or its scales would depend on
            how many ranks share it.
        scale_dtype: dtype of the stored scale; the weight's own if None.
        scale_NG: the stored scales, where a method has chosen them; those of `weight_scale` if None.

    Returns:
        int8 [N, K], within the grid, and the scale [N, G].

    Raises:
        ValueError: the weight holds an infinity or a NaN.
    """
    num_rows, num_columns = weight_NK.shape
    size = _group_width(grid, num_columns)
    num_groups = grid.num_groups(num_columns)
    values_NK = torch.empty(weight_NK.shape, dtype=torch.int8)
    if scale_NG is None:
        stored_NG = torch.empty(num_rows, num_groups, dtype=scale_dtype or weight_NK.dtype)
    else:
        assert scale_NG.shape == (num_rows, num_groups), (scale_NG.shape, weight_NK.shape, grid)
        stored_NG = scale_NG
    blocks = row_blocks(weight_NK)
    # One buffer for all blocks: it stays in cache, and the weight itself is never written to. The
    # columns that a short last group lacks are zeros, which change no largest value.
    buffer_BK = torch.zeros((blocks[0].stop if blocks else 0), num_groups * size)
    for rows in blocks:
        wide_BK = buffer_BK[: rows.stop - rows.start]
        wide_BK[:, :num_columns] = weight_NK[rows]
        wide_BGS = wide_BK.unflatten(1, (num_groups, size))
        if scale_NG is None:
            stored_NG[rows] = _scale(wide_BGS, grid, stored_NG.dtype)
        _check_finite(wide_BK if scale_NG is not None else stored_NG[rows])
        wide_BGS.div_(stored_NG[rows].float().unsqueeze(2)).round_()
        values_NK[rows] = wide_BK.clamp_(grid.lowest, grid.highest)[:, :num_columns]
    return values_NK, stored_NG


def dequantize(
    values_NK: Tensor,
    scale_NG: Tensor,
    dtype: torch.dtype,
    group_size: int | None = None,
    first_column: int = 0,
) -> Tensor:
    """`values * scale`, multiplied in float32, as `dtype`.

    Args:
        group_size: columns that share a scale; None: a whole row does.
        first_column: the place of the first column within its group, where these are a part of a
            row that begins inside one.
    """
    if group_size is None:
        return (values_NK.float() * scale_NG.float()).to(dtype)
    columns_K = torch.arange(values_NK.shape[1], device=values_NK.device) + first_column
    return (values_NK.float() * scale_NG.float()[:, columns_K // group_size]).to(dtype)


def dequantize_into(
    out_NK: Tensor, values_NK: Tensor, scale_NG: Tensor, group_size: int | None
) -> Tensor:
    """What `dequantize` gives, bit for bit, in memory that is there: float32 [N, K]."""
    out_NK.copy_(values_NK)
    if group_size is None:
        return out_NK.mul_(scale_NG.float())
    whole = out_NK.shape[1] // group_size
    grouped_NGS = out_NK[:, : whole * group_size].unflatten(1, (whole, group_size))
    grouped_NGS.mul_(scale_NG[:, :whole].float().unsqueeze(2))
    out_NK[:, whole * group_size :].mul_(scale_NG[:, -1:].float())
    return out_NK


def pack_int4(values_NK: Tensor) -> Tensor:
    """Values within [-8, 7] as nibbles, uint8 [N, ceil(K / 2)].

    An even column is the low nibble and the odd one after it the high nibble, in two's complement;
    a last column without a neighbour has a zero beside it.
    """
    bytes_NK = F.pad(values_NK, (0, values_NK.shape[1] % 2)).view(torch.uint8)
    return (bytes_NK[:, ::2] & 15) | (bytes_NK[:, 1::2] << 4)


def unpack_int4(packed: Tensor, num_columns: int) -> Tensor:
    """int8 [N, num_columns], as they were packed; each byte holds two columns."""
    assert packed.shape[1] == -(-num_columns // 2), (packed.shape, num_columns)
    values_NK = torch.empty(
        len(packed), 2 * packed.shape[1], dtype=torch.int8, device=packed.device
    )
    # Shifts of signed numbers keep the sign.
    values_NK[:, ::2] = (packed << 4).view(torch.int8) >> 4
    values_NK[:, 1::2] = packed.view(torch.int8) >> 4
    return values_NK[:, :num_columns]


def row_blocks(weight_NK: Tensor) -> list[slice]:
    """Slices of rows whose float32 copy has about BLOCK_BYTES."""
    num_rows, row_size = weight_NK.shape
    step = max(1, BLOCK_BYTES // (4 * max(1, row_size)))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _group_width(grid: Grid, num_columns: int) -> int:
    return grid.group_size or max(1, num_columns)


def _scale(weight_NGS: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Tensor:
    highest_NG, lowest_NG = weight_NGS.amax(dim=2), weight_NGS.amin(dim=2)
    amax_NG = torch.maximum(highest_NG, -lowest_NG).float()
    # Divided, not multiplied by a rounded 2 / steps: then -M stands halfway between two integers, as
    # it does in compressed-tensors, and the largest values of all groups do not all shrink.
    scale_NG = (amax_NG / (grid.steps / 2)).to(scale_dtype)
    limits = torch.finfo(scale_dtype)
    scale_NG = scale_NG.clamp(min=limits.smallest_normal * limits.eps)
    return torch.where(amax_NG == 0, torch.ones_like(scale_NG), scale_NG)


def _check_finite(found: Tensor) -> None:
    if not torch.isfinite(found).all():
        raise ValueError("the weight holds an infinity or a NaN")
