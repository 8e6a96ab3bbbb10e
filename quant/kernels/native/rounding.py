"""The passes of rounding.c over a weight: floats in, integers out."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.native.calls import TYPES, call, is_available, widest
from quant.numeric import Grid

# As in types.h; no product takes float16.
_FLOATS = {**TYPES, torch.float16: 5}


def group_amax(weight_NK: Tensor, size: int) -> Tensor:
    """The largest absolute value of each group of columns, [N, G], in the weight's dtype."""
    num_rows, num_columns = weight_NK.shape
    amax_NG = torch.empty(num_rows, -(-num_columns // size), dtype=weight_NK.dtype)
    call("group_amax", *_rows(weight_NK), size, amax_NG)
    return amax_NG


def round_groups(
    weight_NK: Tensor, scale_NG: Tensor, size: int, grid: Grid, out_NK: Tensor
) -> None:
    """`out = clamp(round(weight / scale))`; the scale is float32, out int8, both contiguous."""
    assert scale_NG.is_contiguous(), scale_NG.stride()
    assert out_NK.is_contiguous(), out_NK.stride()
    call("round_groups", *_rows(weight_NK), size, scale_NG, grid.lowest, grid.highest, out_NK)


def takes(weight_NK: Tensor) -> bool:
    """Whether the library is there and reads such a weight: its rows contiguous, on the CPU."""
    return (
        weight_NK.dtype.is_floating_point
        and weight_NK.dtype in _FLOATS
        and weight_NK.device.type == "cpu"
        and weight_NK.stride(1) == 1
        and is_available()
    )


def _rows(weight_NK: Tensor) -> tuple[object, ...]:
    """The fields of either struct from `set` to K."""
    return widest(), weight_NK, _FLOATS[weight_NK.dtype], weight_NK.stride(0), *weight_NK.shape
