"""Products with weights that are not quantized: the fastest way that this processor has."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.kernels.native import step as native
from quant.kernels.native.calls import is_available
from quant.kernels.reference import linear_wide

# Up to so many rows the C product reads bfloat16 weights as fast as memory gives them; from there
# on torch's float32 product of widened blocks is faster.
NATIVE_ROWS = 12


def linear_float(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`x @ weight.T + bias` with float32 sums, rounded to out_dtype once.

    torch's own 16-bit product is taken where the processor has one and the sums need not stay in
    float32: without native bfloat16 it takes 4 to 8 times as long from 8 rows on.
    """
    if out_dtype == x_MK.dtype and _suits_torch(weight_NK):
        return F.linear(x_MK, weight_NK, bias_N)
    if _suits_native(x_MK, weight_NK) and out_dtype in native.FLOATS:
        return native.linear_bfloat16(x_MK, weight_NK, bias_N, out_dtype)
    return linear_wide(x_MK, weight_NK, bias_N, out_dtype)


def _suits_torch(weight_NK: Tensor) -> bool:
    """Whether this device multiplies numbers of this kind itself."""
    if weight_NK.dtype == torch.float32 or weight_NK.device.type != "cpu":
        return True
    return weight_NK.dtype == torch.bfloat16 and _native_bfloat16()


@cache
def _native_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _suits_native(x_MK: Tensor, weight_NK: Tensor) -> bool:
    return (
        weight_NK.dtype == torch.bfloat16
        and x_MK.dtype in native.FLOATS
        and x_MK.stride(1) == 1
        and weight_NK.device.type == "cpu"
        and x_MK.shape[0] <= NATIVE_ROWS
        and weight_NK.is_contiguous()
        and is_available()
    )
