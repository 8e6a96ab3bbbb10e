"""Plain torch products, right on every processor and device; every other path is tested on these."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.weight import QuantizedWeight

# Rows of the weight that are widened at a time: 512 x 5120 float32 are 10 MB, which stay in cache.
BLOCK_ROWS = 512


def linear_w8a16(x_MK: Tensor, weight: QuantizedWeight, out_dtype: torch.dtype) -> Tensor:
    """`x @ dequantize(weight).T`, the scale applied to the sums.

    int8 values are exact in float32, so the only rounding is that of the products' sum.
    """
    sums_MN = _blockwise_product(x_MK.float(), weight.values_NK)
    return sums_MN.mul_(weight.scale_N.float().view(1, -1)).to(out_dtype)


def linear_wide(x_MK: Tensor, weight_NK: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`x @ weight.T` of 16-bit operands with a float32 result that was never rounded to 16 bits."""
    return _blockwise_product(x_MK.float(), weight_NK).to(out_dtype)


def _blockwise_product(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    num_rows = weight_NK.shape[0]
    out_MN = x_MK.new_empty(x_MK.shape[0], num_rows)
    for start in range(0, num_rows, BLOCK_ROWS):
        block_BK = weight_NK[start : start + BLOCK_ROWS].float()
        out_MN[:, start : start + BLOCK_ROWS] = F.linear(x_MK, block_BK)
    return out_MN
