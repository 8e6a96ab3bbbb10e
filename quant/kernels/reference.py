"""Plain torch products, right on every processor and device; every other path is tested on these."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.weight import QuantizedWeight, ReadyWeight, Weight

# Float32 bytes of the weight that are widened at a time, into one buffer that stays in cache.
BLOCK_BYTES = 4 << 20


def linear_w8a16(
    x_MK: Tensor, weight: QuantizedWeight, bias_N: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`x @ dequantize(weight).T + bias`, the scale applied to the sums, rounded once.

    int8 values are exact in float32, so before that the only rounding is the products' sum's.
    """
    sums_MN = _blockwise_product(x_MK.float(), weight.values_NK)
    return _biased(sums_MN.mul_(weight.scale_N.float().view(1, -1)), bias_N).to(out_dtype)


def linear_wide(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`x @ weight.T + bias` of 16-bit operands, its float32 sums never rounded to 16 bits."""
    return _biased(_blockwise_product(x_MK.float(), weight_NK), bias_N).to(out_dtype)


def _biased(sums_MN: Tensor, bias_N: Tensor | None) -> Tensor:
    return sums_MN if bias_N is None else sums_MN.add_(bias_N)


def _blockwise_product(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    num_rows, row_size = weight_NK.shape
    block = max(16, BLOCK_BYTES // (4 * max(1, row_size)))
    wide_BK = x_MK.new_empty(min(block, num_rows), row_size)
    out_MN = x_MK.new_empty(x_MK.shape[0], num_rows)
    for start in range(0, num_rows, block):
        rows_BK = weight_NK[start : start + block]
        block_BK = wide_BK[: len(rows_BK)].copy_(rows_BK)
        out_MN[:, start : start + block] = F.linear(x_MK, block_BK)
    return out_MN


class ReferenceKernel:
    """Leaves a weight as it is: `quant.linear` multiplies it blockwise in float32."""

    name = "reference"

    def pack(self, weight: Weight) -> ReadyWeight:
        return weight
