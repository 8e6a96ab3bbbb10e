"""Products with int8 weights by oneDNN's packed int8 matmul, as torch ships it.

As fast as the memory on processors with VNNI or AMX. Without them its 16-bit intermediate sums
saturate silently (255 * 127 * 2 > 2 ** 15): quant/kernels/choice.py drops the path there.

oneDNN hands its int32 sums out as float32, exact up to 2 ** 24 and rounded once beyond. For int8
activations that is the one rounding that every path makes. Where the integers themselves are needed
(parts of a row, 16-bit activations) the activations are cut into digits so small that no sum passes
2 ** 24; the digits are further rows of one product, so the weights are still read once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.activations import (
    LEVELS_INT8,
    STATIC_HIGHEST,
    finish,
    num_levels,
    quantize_rows,
    quantize_static,
)
from quant.weight import PackedWeight, QuantizedWeight

# Whole numbers of 8 bits become unsigned; a zero point of static activations is added to this one.
_ZERO_POINT = 128
_FLOAT_EXACT = 2**24
# Rows that oneDNN lays the weights out for; the layout serves other numbers of rows too.
_ROWS_HINT = 8


class OneDnnKernel:
    """The path through `torch.ops.onednn`."""

    name = "onednn"

    def pack(self, weight: QuantizedWeight) -> PackedWeight:
        return OneDnnWeight(weight)


class OneDnnWeight(PackedWeight):
    """A weight in oneDNN's own layout."""

    def __init__(self, weight: QuantizedWeight) -> None:
        out_features, in_features = weight.shape
        self._packed = torch.ops.onednn.qlinear_prepack(
            weight.values_NK.contiguous(), [_ROWS_HINT, in_features]
        )
        self._ones_N = torch.ones(out_features)
        self._zeros_N = torch.zeros(out_features, dtype=torch.int64)
        self.scale_N = weight.scale_NG.float().view(-1)
        self.activation_dtype = weight.activation_dtype
        self.input_scale, self.input_zero_point = weight.input_scale, weight.input_zero_point
        self.shape = (out_features, in_features)
        self.nbytes = out_features * in_features + self.scale_N.nbytes

    def linear(self, x_MK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        if self.activation_dtype != "int8":
            return super().linear(x_MK, bias_N, out_dtype)
        if self.input_scale is None:
            q_MK, row_scale_M = quantize_rows(x_MK, LEVELS_INT8)
        else:
            q_MK, row_scale_M = quantize_static(x_MK, self.input_scale, self.input_zero_point)
        sums_MN = self._product(q_MK, _ZERO_POINT + self.input_zero_point)
        return finish(sums_MN, row_scale_M, self.scale_N, bias_N, out_dtype)

    def sums(self, x_MK: Tensor, amax_M: Tensor) -> Tensor:
        levels = num_levels(x_MK.dtype, self.activation_dtype)
        return self._sums_of_digits(quantize_rows(x_MK, levels, amax_M)[0], levels)

    def sums_of_integers(self, q_MK: Tensor) -> Tensor:
        return self._sums_of_digits(q_MK, STATIC_HIGHEST + 1 + abs(self.input_zero_point))

    def _sums_of_digits(self, q_MK: Tensor, levels: int) -> Tensor:
        """See `sums`; of whole numbers within +-levels."""
        radix = digit_radix(self.shape[1])
        parts = digits(q_MK, levels, radix)
        sums_DMN = self._product(torch.cat(parts)).long().unflatten(0, (len(parts), -1))
        total_MN = sums_DMN[0]
        for lower_MN in sums_DMN[1:]:
            total_MN = total_MN * radix + lower_MN
        return total_MN if self.activation_dtype is None else total_MN.int()

    def _product(self, q_MK: Tensor, zero_point: int = _ZERO_POINT) -> Tensor:
        """float32 [M, N]: the int32 sums of whole numbers of 8 bits, each rounded once.

        Args:
            zero_point: what makes them 0 to 255.
        """
        unsigned_MK = (q_MK + zero_point).to(torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(
            unsigned_MK, 1.0, zero_point, self._packed, self._ones_N, self._zeros_N, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip


def digit_radix(in_features: int) -> int:
    """The largest power of two whose digits' sums over a row are exact in float32."""
    radix = 128
    while radix > 2 and (radix // 2) * 128 * in_features > _FLOAT_EXACT:
        radix //= 2
    return radix


def digits(q_MK: Tensor, levels: int, radix: int) -> list[Tensor]:
    """q as whole numbers within +-radix / 2, the highest first: `q = (d0 * radix + d1) * radix …`."""
    if levels <= radix // 2:
        return [q_MK]
    high_MK = (q_MK / radix).round()
    return [*digits(high_MK, -(-levels // radix), radix), q_MK - radix * high_MK]
