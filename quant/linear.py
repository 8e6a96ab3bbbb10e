"""linear(x, weight, bias): the one place that asks what a weight is."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.floats import linear_float
from quant.kernels.reference import ReferenceKernel
from quant.weight import PackedWeight, QuantizedWeight, ReadyWeight


def linear(
    x_MK: Tensor, weight: ReadyWeight, bias_N: Tensor | None = None, *, wide: bool = False
) -> Tensor:
    """`x @ weight.T + bias`.

    Args:
        x_MK: [rows, in_features], the compute dtype.
        weight: [out_features, in_features], a tensor, a QuantizedWeight, or what a kernel packed.
        bias_N: [out_features] or None.
        wide: return float32 sums that were not rounded to 16 bits; partial sums of a row-parallel
            layer travel that way, so that the text does not depend on the number of ranks.

    Returns:
        [rows, out_features], x's dtype, or float32 if wide.
    """
    out_dtype = torch.float32 if wide else x_MK.dtype
    if isinstance(weight, QuantizedWeight):
        weight = ReferenceKernel().pack(weight)
    if isinstance(weight, PackedWeight):
        return weight.linear(x_MK, bias_N, out_dtype)
    return linear_float(x_MK, weight, bias_N, out_dtype)
