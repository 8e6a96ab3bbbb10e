"""The arithmetic of an int8 KV cache as pure functions, and the views that hold it.

Keys, rotated already, and values are symmetric integers: `q = clamp(round(x / scale), -127, 127)`,
ties to even, computed in float32. The scale is one of each token and head, `largest |x| / 127`,
found when the token is written; or a given, static one of each channel, where what is larger than in
calibration saturates. Scales are float32: bfloat16 ones would save 2 of a head's 132 bytes, and the
error is the integers' either way.

A row of zeros has the smallest normal float32 as its scale. A row that holds an infinity or a NaN has
the scale NaN, so that all of it reads as NaN; where the scale is static, such a number is stored as
-128, which reads as NaN.

Shapes: T tokens, H kv heads, C head_dim, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 127
NOT_FINITE = -128


def quantize_tokens(x_THC: Tensor) -> tuple[Tensor, Tensor]:
    """Integers, int8 [T, H, C], and the scale of each token and head, float32 [T, H]."""
    wide_THC = x_THC.float()
    amax_TH = wide_THC.abs().amax(dim=2)
    # The difference is 0, or NaN where the row has an infinity.
    scale_TH = (amax_TH / LEVELS + (amax_TH - amax_TH)).clamp(min=torch.finfo(torch.float32).tiny)
    return _round(wide_THC, scale_TH.unsqueeze(2)), scale_TH


def quantize_channels(x_THC: Tensor, scale_HC: Tensor) -> Tensor:
    """Integers under given scales, int8 [T, H, C]."""
    return _round(x_THC.float(), scale_HC)


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`values * scale`, multiplied in float32, as `dtype`; scale is broadcast."""
    wide = values.float().masked_fill_(values == NOT_FINITE, torch.nan)
    return wide.mul_(scale).to(dtype)


@dataclass(frozen=True)
class Int8Store:
    """Views of int8 keys and values in a cache, and of their scales.

    Attributes:
        keys, values: int8 [..., C] of the same strides; seen by slot [H, S, C], by row [H, L, C], or
            by rows [B, H, L, C].
        key_scale, value_scale: float32, of the same strides: the same axes without C; or [H, C].
        is_static: whether the scales are the latter.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor
    value_scale: Tensor
    is_static: bool

    def part(self, index: tuple[int | slice, ...]) -> Int8Store:
        """A view of some rows, heads and positions; static scales stay whole, so all heads."""
        scales = (self.key_scale, self.value_scale)
        if not self.is_static:
            scales = (self.key_scale[index], self.value_scale[index])
        return Int8Store(self.keys[index], self.values[index], *scales, self.is_static)

    def write(self, k_THC: Tensor, v_THC: Tensor, slots_T: Tensor) -> None:
        """Quantize keys and values, and store them; this is a view by slot."""
        for x_THC, held, scale in (
            (k_THC, self.keys, self.key_scale),
            (v_THC, self.values, self.value_scale),
        ):
            if self.is_static:
                found_THC = quantize_channels(x_THC, scale)
            else:
                found_THC, scale_TH = quantize_tokens(x_THC)
                scale.index_copy_(1, slots_T, scale_TH.T)
            held.index_copy_(1, slots_T, found_THC.transpose(0, 1))

    def dequantize(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values as floats; this is a view by row or rows."""
        return (
            dequantize(self.keys, self._spread(self.key_scale), dtype),
            dequantize(self.values, self._spread(self.value_scale), dtype),
        )

    def _spread(self, scale: Tensor) -> Tensor:
        return scale.unsqueeze(-2 if self.is_static else -1)


def _round(wide_THC: Tensor, scale: Tensor) -> Tensor:
    quotient_THC = wide_THC / scale
    is_bad = ~wide_THC.isfinite() | quotient_THC.isnan()
    rounded_THC = quotient_THC.round_().clamp_(-LEVELS, LEVELS)
    return rounded_THC.masked_fill_(is_bad, NOT_FINITE).to(torch.int8)
