"""Plain torch products, right on every processor and device; every other path is tested on these."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.activations import MOST_INT32_COLUMNS, RADIX, num_levels, planes, quantize_rows
from quant.weight import PackedWeight, QuantizedWeight

# Float32 bytes of the weight that are widened at a time, into one buffer that stays in cache.
BLOCK_BYTES = 4 << 20
# Columns whose products with a plane add up exactly in float32: 127 * 128 * 1024 < 2 ** 24.
EXACT_COLUMNS = 1024


class ReferenceKernel:
    """Multiplies planes of activations with widened weights in float32, where both are exact."""

    name = "reference"

    def pack(self, weight: QuantizedWeight) -> PackedWeight:
        return ReferenceWeight(weight)


class ReferenceWeight(PackedWeight):
    """A quantized weight as it is stored."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.values_NK = weight.values_NK
        self.scale_N = weight.scale_N.float().view(-1)
        self.activation_dtype = weight.activation_dtype
        self.shape = (weight.shape[0], weight.shape[1])
        self.nbytes = weight.values_NK.nbytes + self.scale_N.nbytes

    def sums(self, x_MK: Tensor, amax_M: Tensor) -> Tensor:
        levels = num_levels(x_MK.dtype, self.activation_dtype)
        parts = planes(quantize_rows(x_MK, levels, amax_M)[0], levels)
        sums_PMN = _exact_product(torch.cat(parts), self.values_NK).unflatten(0, (len(parts), -1))
        total_MN = sums_PMN[0]
        for lower_MN in sums_PMN[1:]:
            total_MN = total_MN * RADIX + lower_MN
        if self.activation_dtype is None:
            return total_MN
        assert self.shape[1] <= MOST_INT32_COLUMNS, self.shape
        return total_MN.int()


def linear_wide(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`x @ weight.T + bias` of 16-bit operands in float32: sums are rounded to out_dtype once."""
    x_MK = x_MK.float()
    out_MN = x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])
    for rows, wide_BK in _widened_blocks(weight_NK):
        out_MN[:, rows] = F.linear(x_MK, wide_BK)
    if bias_N is not None:
        out_MN += bias_N
    return out_MN.to(out_dtype)


def _exact_product(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """int64 [M, N]: whole numbers within +-127 times int8, whatever the order of the sums."""
    out_MN = torch.empty(
        x_MK.shape[0], weight_NK.shape[0], dtype=torch.int64, device=weight_NK.device
    )
    for rows, wide_BK in _widened_blocks(weight_NK):
        out_MB = out_MN[:, rows].zero_()
        for x_MC, wide_BC in zip(
            x_MK.split(EXACT_COLUMNS, 1), wide_BK.split(EXACT_COLUMNS, 1), strict=True
        ):
            out_MB += F.linear(x_MC, wide_BC).long()
    return out_MN


def _widened_blocks(weight_NK: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with their float32 copy, which the next one overwrites."""
    num_rows, row_size = weight_NK.shape
    block = max(16, BLOCK_BYTES // (4 * max(1, row_size)))
    wide_BK = torch.empty(
        min(block, num_rows), row_size, dtype=torch.float32, device=weight_NK.device
    )
    for start in range(0, num_rows, block):
        rows_BK = weight_NK[start : start + block]
        yield slice(start, start + len(rows_BK)), wide_BK[: len(rows_BK)].copy_(rows_BK)
