"""Activations as integers: what makes a product with int8 weights exact, whatever computes it.

A row x becomes integers `q = round(x / scale)`, `scale = amax / levels`, amax the largest absolute
value of the row; then `x @ W.T = scale * (q @ values.T) * weight_scale`, where the product in
brackets is a sum of integers: the same on every processor, in every order, on every number of ranks
whose rows are scaled together. The number of levels decides what is lost:

    int8 activations    127             of each row, dynamic; or static, of a calibrated scale (W8A8)
    16-bit activations  127 * 254       16 bits of the largest value; bfloat16 itself holds 8
    float32             127 * 254 ** 2  24 bits

A row is split into planes of 8 bits where a processor multiplies no wider integers:
`q = 254 ** 2 * high + 254 * middle + low`, each of them within +-127.
"""

from __future__ import annotations

import torch
from torch import Tensor

RADIX = 254
LEVELS_INT8 = 127
# Beyond what calibration saw, static activations are clamped to all that int8 holds.
STATIC_LOWEST, STATIC_HIGHEST = -128, 127
# Below this the inverse of the scale would overflow; such rows are rounded more coarsely.
LEAST_AMAX = 1e-30


def most_int32_columns(zero_point: int = 0) -> int:
    """So many columns of int8 weights and activations, less the zero point, add up within int32."""
    return (2**31 - 1) // (128 * (128 + abs(zero_point)))


def num_levels(x_dtype: torch.dtype, activation_dtype: str | None) -> int:
    """The largest |q| of activations of a dtype; `activation_dtype` is the scheme's."""
    if activation_dtype == "int8":
        return LEVELS_INT8
    return LEVELS_INT8 * (RADIX**2 if x_dtype == torch.float32 else RADIX)


def row_amax(x_MK: Tensor) -> Tensor:
    """float32 [M]: the largest absolute value of each row; NaN where a row holds one."""
    if x_MK.shape[1] == 0:
        return x_MK.new_zeros(x_MK.shape[0], dtype=torch.float32)
    return x_MK.abs().amax(dim=1).float()


def quantize_rows(x_MK: Tensor, levels: int, amax_M: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows as integers, rounded to nearest, ties to even; computed in float32.

    Args:
        amax_M: of the longer rows that these are parts of; None: these rows are whole.

    Returns:
        float32 [M, K] of whole numbers, and the scale of each row, float32 [M]. A row that holds
        an infinity or a NaN becomes zeros with the scale NaN, so that its output is NaN.
    """
    amax_M = row_amax(x_MK) if amax_M is None else amax_M
    is_finite_M = amax_M.isfinite()
    # A tensor divided by a tensor: a number divided by a tensor is a product with its reciprocal.
    inverse_M = torch.full_like(amax_M, levels) / amax_M.clamp(min=LEAST_AMAX)
    q_MK = (x_MK.float() * inverse_M[:, None]).round_()
    return torch.where(is_finite_M[:, None], q_MK, 0.0), row_scale(amax_M, levels)


def quantize_static(x_MK: Tensor, scale: Tensor, zero_point: int = 0) -> tuple[Tensor, Tensor]:
    """Rows as integers of a scale that was calibrated: `clamp(round(x / scale), -128, 127)`.

    With a zero point z an integer of 8 bits is `clamp(round(x / scale) + z, -128, 127)`, and stands
    for itself less z. That difference is what is returned: it is x clamped to a range that z moves,
    `clamp(round(x / scale), -128 - z, 127 - z)`, within +-255. So a product has nothing to correct,
    and those of parts of a row add up as ever.

    The division is one, not a product with the reciprocal: its bits are those that calibration
    rounded by (quant/methods/layer.py). Other rows, or parts of a row, change nothing.

    Args:
        scale: float32 [1], above zero.
        zero_point: -128 to 127; 0: symmetric activations.

    Returns:
        As `quantize_rows`: a row that holds an infinity or a NaN becomes zeros with the scale NaN.
        An infinity is damage, not a large value to clamp.
    """
    is_finite_M = row_amax(x_MK).isfinite()
    lowest, highest = STATIC_LOWEST - zero_point, STATIC_HIGHEST - zero_point
    q_MK = (x_MK.float() / scale).round_().clamp_(lowest, highest)
    row_scale_M = torch.where(is_finite_M, scale, torch.nan)
    return torch.where(is_finite_M[:, None], q_MK, 0.0), row_scale_M


def row_scale(amax_M: Tensor, levels: int) -> Tensor:
    """float32 [M]; NaN where amax is no finite number."""
    scale_M = amax_M.clamp(min=LEAST_AMAX) / torch.full_like(amax_M, levels)
    return torch.where(amax_M.isfinite(), scale_M, torch.nan)


def planes(q_MK: Tensor, levels: int) -> list[Tensor]:
    """q as planes of whole numbers within +-127, the highest first: one, two or three."""
    if levels == LEVELS_INT8:
        return [q_MK]
    low_MK = q_MK - RADIX * (q_MK / RADIX).round()
    high_MK = ((q_MK - low_MK) / RADIX).round()
    return [*planes(high_MK, levels // RADIX), low_MK]


def finish(
    sums_MN: Tensor,
    row_scale_M: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Integer sums as the product: `sums * row_scale * scale + bias` in float32, rounded once more.

    The order of the two products is part of the result's bits: every path keeps it.
    """
    out_MN = sums_MN.float().mul_(row_scale_M[:, None]).mul_(scale_N.float().view(1, -1))
    if bias_N is not None:
        out_MN += bias_N.float()
    return out_MN.to(out_dtype)
