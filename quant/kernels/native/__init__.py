"""The C library: products with int8 weights (int8.c says how they are exact on every processor) and
with bfloat16 ones, decode attention, and what lies between the products of a layer.

The library is compiled when the package is installed, where there is a C compiler; without it this
path is absent and the others do the work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.activations import LEVELS_INT8, num_levels
from quant.kernels.native.library import TYPES, call, instruction_sets, open_library
from quant.weight import PackedWeight, QuantizedWeight, split_static

BLOCK = 32  # as in int8.c


class NativeKernel:
    """The C path.

    Args:
        instruction_set: one of `instruction_sets()`; None takes the widest.

    Raises:
        OSError: the library is not there, or cannot be loaded.
    """

    name = "native"

    def __init__(self, instruction_set: str | None = None) -> None:
        known = instruction_sets()
        self.instruction_set = instruction_set or list(known)[-1]
        self.set_index = known[self.instruction_set]

    def pack(self, weight: QuantizedWeight) -> PackedWeight:
        return NativeWeight(weight, self.set_index)


class NativeWeight(PackedWeight):
    """A weight in blocks of 32 output channels, as int8.c reads them."""

    def __init__(self, weight: QuantizedWeight, set_index: int) -> None:
        out_features, in_features = weight.shape
        values_NK = weight.values_NK
        if values_NK.stride(1) != 1:
            values_NK = values_NK.contiguous()
        self._set_index = set_index
        self._packed = torch.empty(
            -(-out_features // BLOCK), -(-in_features // 2), BLOCK, 2, dtype=torch.int8
        )
        open_library().shardrun_pack(
            values_NK.data_ptr(), values_NK.stride(0), *values_NK.shape, self._packed.data_ptr()
        )
        self.scale_N = weight.scale_NG.float().reshape(-1).contiguous()
        self.activation_dtype = weight.activation_dtype
        self.input_scale = weight.input_scale
        self.shape = (out_features, in_features)
        self.nbytes = self._packed.nbytes + self.scale_N.nbytes

    def linear(self, x_MK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        kind = out_dtype if out_dtype in TYPES else torch.float32
        out_MN = torch.empty(x_MK.shape[0], self.shape[0], dtype=kind)
        self._multiply(x_MK, out_MN, bias_N=bias_N)
        return out_MN.to(out_dtype)

    def sums(self, x_MK: Tensor, amax_M: Tensor) -> Tensor:
        assert self.input_scale is None, "static activations"
        kind = torch.int64 if self.activation_dtype is None else torch.int32
        out_MN = torch.empty(x_MK.shape[0], self.shape[0], dtype=kind)
        self._multiply(x_MK, out_MN, amax_M=amax_M)
        return out_MN

    def static_sums(self, x_MK: Tensor) -> Tensor:
        sums = torch.empty(x_MK.shape[0] * (self.shape[0] + 1), dtype=torch.int32)
        sums_MN, damaged_M = split_static(sums, self.shape[0])
        self._multiply(x_MK, sums_MN, damaged_M=damaged_M)
        return sums

    def row_amax(self, x_MK: Tensor) -> Tensor:
        x_MK = _with_rows(x_MK)
        amax_M = torch.empty(x_MK.shape[0])
        call(
            "row_amax",
            self._set_index,
            x_MK,
            TYPES[x_MK.dtype],
            x_MK.stride(0),
            *x_MK.shape,
            amax_M,
        )
        return amax_M

    def finish(
        self,
        sums_MN: Tensor,
        amax_M: Tensor,
        bias_N: Tensor | None,
        x_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> Tensor:
        levels = num_levels(x_dtype, self.activation_dtype)
        return self._finish(sums_MN, (amax_M, None, None, levels), bias_N, out_dtype)

    def finish_static(
        self, static_sums: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        sums_MN, damaged_M = split_static(static_sums, self.shape[0])
        rows = (None, self.input_scale, damaged_M, LEVELS_INT8)
        return self._finish(sums_MN, rows, bias_N, out_dtype)

    def _finish(
        self,
        sums_MN: Tensor,
        rows: tuple[Tensor | None, Tensor | None, Tensor | None, int],
        bias_N: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """`rows`: what says their scales: amax, input_scale, damaged and levels of int8.c."""
        kind = out_dtype if out_dtype in TYPES else torch.float32
        out_MN = torch.empty(sums_MN.shape, dtype=kind)
        call(
            "finish", sums_MN, TYPES[sums_MN.dtype], *rows, *sums_MN.shape, self.scale_N,
            *_bias(bias_N, self.shape[0]), out_MN, TYPES[kind],
        )  # fmt: skip
        return out_MN.to(out_dtype)

    def _multiply(
        self,
        x_MK: Tensor,
        out_MN: Tensor,
        *,
        amax_M: Tensor | None = None,
        damaged_M: Tensor | None = None,
        bias_N: Tensor | None = None,
    ) -> None:
        levels = num_levels(x_MK.dtype, self.activation_dtype)
        x_MK = _with_rows(x_MK)
        num_rows, in_features = x_MK.shape
        assert in_features == self.shape[1], (x_MK.shape, self.shape)
        num_planes = 1 if levels <= torch.iinfo(torch.int16).max else 2
        work_size = num_rows * (num_planes * 2 * (in_features + in_features % 2) + 4)
        work = torch.empty(work_size, dtype=torch.uint8)
        call(
            "linear", self._set_index, x_MK, TYPES[x_MK.dtype], x_MK.stride(0), amax_M,
            self.input_scale, num_rows, in_features, levels, self._packed, self.shape[0],
            self.scale_N, *_bias(bias_N, self.shape[0]), out_MN, TYPES[out_MN.dtype], damaged_M,
            work,
        )  # fmt: skip


def _with_rows(x_MK: Tensor) -> Tensor:
    """x in a dtype that the library reads, a row's numbers side by side."""
    x_MK = x_MK if x_MK.dtype in (torch.float32, torch.bfloat16) else x_MK.float()
    return x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()


def _bias(bias_N: Tensor | None, out_features: int) -> tuple[Tensor | None, int]:
    """A bias and its type, as the structs want them."""
    if bias_N is None:
        return None, 0
    assert len(bias_N) == out_features, (bias_N.shape, out_features)
    bias_N = _with_rows(bias_N[None])[0]
    return bias_N, TYPES[bias_N.dtype]
