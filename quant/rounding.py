"""A weight becomes integers: two passes over it, the largest value of each group and the rounding.

Shapes: N out_features, K in_features, G groups of columns (1 for a whole row), S columns of a group,
B rows of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.errors import QuantError
from quant.kernels.native import rounding as native
from quant.numeric import Grid

# Rows are worked on a block at a time, which stays in cache between the passes: a float32 copy of a
# 70B's weight (0.9 GB) never is.
BLOCK_BYTES = 32 << 20


def weight_scale(weight_NK: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Tensor:
    """The scale of each group of each output channel.

    Args:
        weight_NK: [out_features, in_features], a floating dtype.
        scale_dtype: the dtype the scale is stored in; the checkpoint's own.

    Returns:
        [N, G] in `scale_dtype`, positive and finite, and no group lies more than a step beyond the
        grid: see `_scale`. An all-zero group gets 1.

    Raises:
        QuantError: a scale is larger than `scale_dtype` holds.
    """
    return _scale(group_amax(weight_NK, _group_width(grid, weight_NK.shape[1])), grid, scale_dtype)


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
        QuantError: a scale is larger than `scale_dtype` holds.
    """
    num_rows, num_columns = weight_NK.shape
    size = _group_width(grid, num_columns)
    values_NK = torch.empty(weight_NK.shape, dtype=torch.int8)
    if scale_NG is None:
        shape = num_rows, grid.num_groups(num_columns)
        stored_NG = torch.empty(shape, dtype=scale_dtype or weight_NK.dtype)
    else:
        stored_NG = scale_NG
    assert stored_NG.shape == (num_rows, grid.num_groups(num_columns)), (stored_NG.shape, grid)
    for rows in row_blocks(weight_NK):
        # The second pass finds the block in cache.
        block_BK = weight_NK[rows]
        amax_BG = group_amax(block_BK, size)
        _check_finite(amax_BG)
        if scale_NG is None:
            stored_NG[rows] = _scale(amax_BG, grid, stored_NG.dtype)
        scale_BG = stored_NG[rows].float()
        round_groups(block_BK, scale_BG, size, grid, values_NK[rows])
    return values_NK, stored_NG


def group_amax(weight_NK: Tensor, size: int) -> Tensor:
    """The largest absolute value of each group of `size` columns, [N, G] in float32.

    A last group may be short. A NaN, or else an infinity, is the largest of its group.
    """
    if native.takes(weight_NK):
        return native.group_amax(weight_NK, size).float()
    groups_NGS = _grouped(weight_NK, size)
    return torch.maximum(groups_NGS.amax(dim=2), -groups_NGS.amin(dim=2)).float()


def round_groups(
    weight_NK: Tensor, scale_NG: Tensor, size: int, grid: Grid, out_NK: Tensor
) -> None:
    """`out = clamp(round(weight / scale))`, ties to even, int8; divided in float32.

    Args:
        scale_NG: float32, contiguous, finite and so large that no quotient is beyond 2 ** 22.
        out_NK: contiguous.
    """
    if native.takes(weight_NK):
        native.round_groups(weight_NK, scale_NG, size, grid, out_NK)
        return
    quotients_NGS = _grouped(weight_NK, size).float().div_(scale_NG.unsqueeze(2)).round_()
    integers_NK = quotients_NGS.clamp_(grid.lowest, grid.highest).flatten(1)
    out_NK.copy_(integers_NK[:, : weight_NK.shape[1]])


def _grouped(weight_NK: Tensor, size: int) -> Tensor:
    """[N, G, S]; the columns that a short last group lacks are zeros, which change no largest value."""
    missing = -weight_NK.shape[1] % size
    padded_NK = F.pad(weight_NK, (0, missing)) if missing else weight_NK
    return padded_NK.unflatten(1, (-1, size))


def row_blocks(weight_NK: Tensor) -> list[slice]:
    """Slices of rows whose float32 copy has about BLOCK_BYTES."""
    num_rows, row_size = weight_NK.shape
    step = max(1, BLOCK_BYTES // (4 * max(1, row_size)))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _group_width(grid: Grid, num_columns: int) -> int:
    return grid.group_size or max(1, num_columns)


def _scale(amax_NG: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Tensor:
    # Divided, not multiplied by a rounded 2 / steps: then -M stands halfway between two integers, as
    # it does in compressed-tensors, and the largest values of all groups do not all shrink.
    scale_NG = (amax_NG / (grid.steps / 2)).to(scale_dtype)
    # A scale that is a normal number is so exact that no value lies more than a step beyond the grid. A
    # subnormal one has few bits: rounded down it can lose a third or all of itself, and the largest
    # values would be clipped. There the next number is taken, which is large enough for the group.
    is_short = scale_NG.float() * -grid.lowest < amax_NG
    limits = torch.finfo(scale_dtype)
    scale_NG = torch.where(is_short, scale_NG + limits.smallest_normal * limits.eps, scale_NG)
    if scale_NG.isinf().any():
        raise QuantError(
            f"`quant` needs a scale for weights of up to {amax_NG.max():.3g} that {_name(scale_dtype)}, "
            "the checkpoint's dtype, cannot hold; save the checkpoint in bfloat16."
        )
    return torch.where(amax_NG == 0, torch.ones_like(scale_NG), scale_NG)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_finite(found: Tensor) -> None:
    if not torch.isfinite(found).all():
        raise ValueError("the weight holds an infinity or a NaN")
