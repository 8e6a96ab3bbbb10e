"""int8 weights with one scale a channel, as int8.c multiplies them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.activations import num_levels
from quant.kernels.native.calls import TYPES, call, open_library
from quant.kernels.native.weight import (
    NativeWeight,
    bias_and_type,
    num_planes,
    pack_blocks,
    with_columns,
    with_rows,
)
from quant.packing import QUAD, int8_shape
from quant.weight import QuantizedWeight, joined_shape, split_static


class Int8NativeWeight(NativeWeight):
    """Pairs, or quads, of columns of 32 channels side by side."""

    def __init__(self, parts: Sequence[QuantizedWeight], set_index: int) -> None:
        weight, (out_features, in_features) = parts[0], joined_shape(parts)
        assert weight.bits == 8, weight.scheme
        assert weight.group_size is None, weight.scheme
        self._set_index = set_index
        library = open_library()
        # Only activations of 8 bits have few enough levels for quads, whatever their dtype.
        width = library.shardrun_width(
            set_index, num_levels(torch.bfloat16, weight.activation_dtype)
        )
        self.packed = torch.empty(int8_shape(out_features, in_features, width), dtype=torch.int8)
        pack = library.shardrun_pack_quads if width == QUAD else library.shardrun_pack_pairs
        rows = ((pack, with_columns(part.values_NK)) for part in parts)
        pack_blocks(rows, self.packed, (out_features, in_features))
        self.scale_N = torch.cat([part.scale_NG.float().reshape(-1) for part in parts])
        self.activation_dtype = weight.activation_dtype
        self.input_scale, self.input_zero_point = weight.input_scale, weight.input_zero_point
        self.shape = (out_features, in_features)
        self.nbytes = self.packed.nbytes + self.scale_N.nbytes

    def sums(self, x_MK: Tensor, amax_M: Tensor) -> Tensor:
        assert self.input_scale is None, "static activations"
        return super().sums(x_MK, amax_M)

    def static_sums(self, x_MK: Tensor) -> Tensor:
        sums = torch.empty(x_MK.shape[0] * (self.shape[0] + 1), dtype=torch.int32)
        sums_MN, damaged_M = split_static(sums, self.shape[0])
        self._fill(sums_MN, x_MK, None, None, damaged_M)
        return sums

    def _multiply(
        self, x_MK: Tensor, amax_M: Tensor | None, bias_N: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        out_MN = torch.empty(x_MK.shape[0], self.shape[0], dtype=out_dtype)
        self._fill(out_MN, x_MK, amax_M, bias_N)
        return out_MN

    def _fill(
        self,
        out_MN: Tensor,
        x_MK: Tensor,
        amax_M: Tensor | None,
        bias_N: Tensor | None,
        damaged_M: Tensor | None = None,
    ) -> None:
        levels = num_levels(x_MK.dtype, self.activation_dtype)
        x_MK = with_rows(x_MK)
        num_rows, in_features = x_MK.shape
        assert in_features == self.shape[1], (x_MK.shape, self.shape)
        work_size = num_rows * (num_planes(levels) * 2 * (in_features + in_features % 2 + 16) + 4)
        work = torch.empty(work_size, dtype=torch.uint8)
        call(
            "linear", self._set_index, x_MK, TYPES[x_MK.dtype], x_MK.stride(0), amax_M,
            self.input_scale, self.input_zero_point, num_rows, in_features, levels, self.packed,
            self.shape[0], self.scale_N, *bias_and_type(bias_N, self.shape[0]), out_MN,
            TYPES[out_MN.dtype], damaged_M, work,
        )  # fmt: skip
