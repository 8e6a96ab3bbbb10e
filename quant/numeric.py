"""Quantize and dequantize as pure functions.

The rule is symmetric round-to-nearest as in Golden Stick and compressed-tensors: with M the largest
absolute value of a channel, `scale = 2 M / 255`, `q = clamp(round(w / scale), -128, 127)`. It is
computed in float32 whatever the dtype of the weight, and from the *stored* scale, so that a scale
kept in 16 bits multiplies back exactly what was divided by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MIN, INT8_MAX = -128, 127
# Rows are converted a block at a time, in a buffer that stays in cache: the float32 copy of a 70B's
# weight (0.9 GB) never is.
BLOCK_BYTES = 4 << 20


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


def dequantize(quantized_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """`quantized * scale`, multiplied in float32, as `dtype`."""
    return (quantized_NK.float() * scale_N.float()).to(dtype)


def row_blocks(weight_NK: Tensor) -> list[slice]:
    """Slices of rows whose float32 copy has about BLOCK_BYTES."""
    num_rows, row_size = weight_NK.shape
    step = max(1, BLOCK_BYTES // (4 * max(1, row_size)))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
