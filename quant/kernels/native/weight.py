"""What the weights that C multiplies have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from quant.activations import LEVELS_INT8, num_levels
from quant.kernels.native.calls import TYPES, call
from quant.packing import BLOCK
from quant.weight import PackedWeight, split_static

# One of C's functions that pack, and the rows that it packs.
Rows = tuple[Callable[..., Any], Tensor]


class NativeWeight(PackedWeight):
    """A weight in blocks of 32 output channels.

    Attributes:
        packed: what a product reads, but for its scales.
    """

    packed: Tensor
    _set_index: int

    def linear(self, x_MK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        kind = out_dtype if out_dtype in TYPES else torch.float32
        return self._multiply(x_MK, None, bias_N, kind).to(out_dtype)

    def sums(self, x_MK: Tensor, amax_M: Tensor) -> Tensor:
        """See PackedWeight; of static activations, of rows that are their own integers."""
        return self._multiply(x_MK, amax_M, None, self._sums_dtype)

    def row_amax(self, x_MK: Tensor) -> Tensor:
        x_MK = with_rows(x_MK)
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
        if damaged_M.dtype != torch.int32:  # grouped sums
            return super().finish_static(static_sums, bias_N, out_dtype)
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
        scale_N = self.scale_N if self.group_size is None else None
        call(
            "finish", sums_MN, TYPES[sums_MN.dtype], *rows, *sums_MN.shape, scale_N,
            *bias_and_type(bias_N, self.shape[0]), out_MN, TYPES[kind],
        )  # fmt: skip
        return out_MN.to(out_dtype)

    @property
    def _sums_dtype(self) -> torch.dtype:
        if self.group_size is not None:
            return torch.float32
        return torch.int64 if self.activation_dtype is None else torch.int32

    @abstractmethod
    def _multiply(
        self, x_MK: Tensor, amax_M: Tensor | None, bias_N: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        """The sums where amax is given, as `sums` returns them; else the whole product."""


def pack_blocks(parts: Iterable[Rows], packed: Tensor, shape: tuple[int, int]) -> None:
    """Pack rows of one part after the other, each straight into its place.

    Args:
        parts: taken one at a time, so that what is made for one need not stay for the next.
        packed: [blocks, ...], fresh memory; channels that the last block lacks become zeros.
        shape: all rows, and their columns as they are packed.
    """
    if shape[0] % BLOCK:
        packed[-1].zero_()
    first = 0
    for pack, rows in parts:
        pack(rows.data_ptr(), rows.stride(0), len(rows), shape[1], packed.data_ptr(), first)
        first += len(rows)
    assert first == shape[0], (first, shape)


def num_planes(levels: int) -> int:
    """Planes of 16 bits that hold integers of up to `levels`."""
    return 1 if levels <= torch.iinfo(torch.int16).max else 2


def with_rows(x_MK: Tensor) -> Tensor:
    """x in a dtype that the library reads, a row's numbers side by side."""
    x_MK = x_MK if x_MK.dtype in (torch.float32, torch.bfloat16) else x_MK.float()
    return x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()


def bias_and_type(bias_N: Tensor | None, out_features: int) -> tuple[Tensor | None, int]:
    """A bias and its type, as the structs want them."""
    if bias_N is None:
        return None, 0
    assert len(bias_N) == out_features, (bias_N.shape, out_features)
    bias_N = with_rows(bias_N[None])[0]
    return bias_N, TYPES[bias_N.dtype]


def with_columns(values_NK: Tensor) -> Tensor:
    """A row's numbers side by side."""
    return values_NK if values_NK.stride(1) == 1 else values_NK.contiguous()
