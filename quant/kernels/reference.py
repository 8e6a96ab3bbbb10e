"""Plain torch products, right on every processor and device; every other path is tested on these.

Shapes: M rows, N out_features, K in_features, P planes, Q rows of all planes,
G groups of S columns, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.activations import RADIX, most_int32_columns, num_levels, planes, quantize_rows
from quant.numeric import pack_int4, unpack_int4
from quant.weight import PackedWeight, QuantizedWeight

# Float32 bytes of the weight that are widened at a time, into one buffer that stays in cache.
BLOCK_BYTES = 4 << 20
# Columns whose products with a plane add up exactly in float32: 128 * 128 * 1024 <= 2 ** 24.
EXACT_COLUMNS = 1024


class ReferenceKernel:
    """Multiplies planes of activations with widened weights in float32, where both are exact."""

    name = "reference"

    def pack(self, weight: QuantizedWeight) -> PackedWeight:
        if weight.group_size is None:
            return ReferenceWeight(weight)
        return GroupedReferenceWeight(weight)


class ReferenceWeight(PackedWeight):
    """A weight with one scale a channel, as it is stored: bytes, or two values a byte."""

    def __init__(self, weight: QuantizedWeight) -> None:
        assert weight.group_size is None, weight.group_size
        self._stored = _Stored(weight)
        self.scale_N = weight.scale_NG.float().view(-1)
        self.activation_dtype = weight.activation_dtype
        self.input_scale, self.input_zero_point = weight.input_scale, weight.input_zero_point
        # Less a zero point, activations may be twice as large.
        self._exact_columns = EXACT_COLUMNS // (2 if weight.input_zero_point else 1)
        self.shape = (weight.shape[0], weight.shape[1])
        self.nbytes = self._stored.nbytes + self.scale_N.nbytes

    def sums(self, x_MK: Tensor, amax_M: Tensor) -> Tensor:
        levels = num_levels(x_MK.dtype, self.activation_dtype)
        parts = planes(quantize_rows(x_MK, levels, amax_M)[0], levels)
        sums_PMN = self._product(torch.cat(parts)).unflatten(0, (len(parts), -1))
        total_MN = _join_planes(sums_PMN, torch.int64)
        if self.activation_dtype is None:
            return total_MN
        assert self.shape[1] <= most_int32_columns(self.input_zero_point), self.shape
        return total_MN.int()

    def _product(self, x_MK: Tensor) -> Tensor:
        """int64 [M, N]: whole numbers of 8 bits, less a zero point, times int8; in any order."""
        device = self._stored.device
        out_MN = torch.empty(x_MK.shape[0], self.shape[0], dtype=torch.int64, device=device)
        for rows, wide_BK in _widened_blocks(self.shape, self._stored.rows, device):
            out_MB = out_MN[:, rows].zero_()
            for x_MC, wide_BC in zip(
                x_MK.split(self._exact_columns, 1),
                wide_BK.split(self._exact_columns, 1),
                strict=True,
            ):
                out_MB += F.linear(x_MC, wide_BC).long()
        return out_MN


class GroupedReferenceWeight(PackedWeight):
    """A weight with a scale for each group of columns, as it is stored.

    The sum of a group is one of integers, exact in any order; it is rounded to float32, multiplied
    by the group's scale in float32 and added to those of the groups before it, one after the other.
    So the bits depend on no block size. Against the same sums in float64 the result is off by at
    most (G + 2) * 2 ** -24 of the sum of the groups' absolute values.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        assert weight.group_size is not None
        self._stored = _Stored(weight)
        self._scale_NG = weight.scale_NG  # in the checkpoint's dtype: half the bytes of float32
        self._first_column = weight.first_column
        self.group_size = weight.group_size
        self.scale_N = torch.ones(weight.shape[0], device=weight.values_NK.device)
        self.activation_dtype = weight.activation_dtype
        self.input_scale, self.input_zero_point = weight.input_scale, weight.input_zero_point
        self.shape = (weight.shape[0], weight.shape[1])
        self.nbytes = self._stored.nbytes + self._scale_NG.nbytes

    def sums(self, x_MK: Tensor, amax_M: Tensor) -> Tensor:
        levels = num_levels(x_MK.dtype, self.activation_dtype)
        parts = planes(quantize_rows(x_MK, levels, amax_M)[0], levels)
        x_QGS = self._in_groups(torch.cat(parts))
        out_MN = x_MK.new_empty(x_MK.shape[0], self.shape[0], dtype=torch.float32)
        for rows, wide_BGS in self._blocks():
            sums_GQB = x_QGS.transpose(0, 1) @ wide_BGS.permute(1, 2, 0)
            sums_PGMB = sums_GQB.unflatten(1, (len(parts), -1)).transpose(0, 1)
            # Below 2 ** 53, as all sums of a group are.
            total_GMB = _join_planes(sums_PGMB, torch.float64)
            scaled_GMB = total_GMB.float() * self._scale_NG[rows].float().T.unsqueeze(1)
            out_MB = scaled_GMB[0]
            for next_MB in scaled_GMB[1:]:
                out_MB += next_MB
            out_MN[:, rows] = out_MB
        return out_MN

    def _in_groups(self, x_MK: Tensor) -> Tensor:
        """[M, G, S], with zeros for the columns of the first and the last group that are not here."""
        return F.pad(x_MK, self._missing).unflatten(1, (-1, self._group_size))

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for rows, wide_BK in _widened_blocks(self.shape, self._stored.rows, self._stored.device):
            yield rows, self._in_groups(wide_BK)

    @property
    def _missing(self) -> tuple[int, int]:
        return self._first_column, -(self._first_column + self.shape[1]) % self._group_size

    @property
    def _group_size(self) -> int:
        assert self.group_size is not None
        return self.group_size


class _Stored:
    """The integers of a weight in as few bytes as they have: int8, or nibbles."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self._num_columns = weight.shape[1]
        self._is_packed = weight.bits == 4
        self._data = pack_int4(weight.values_NK) if self._is_packed else weight.values_NK
        self.nbytes, self.device = self._data.nbytes, self._data.device

    def rows(self, rows: slice) -> Tensor:
        """int8 [B, K]."""
        data = self._data[rows]
        return unpack_int4(data, self._num_columns) if self._is_packed else data


def linear_wide(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`x @ weight.T + bias` of 16-bit operands in float32: sums are rounded to out_dtype once."""
    x_MK = x_MK.float()
    out_MN = x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])
    for rows, wide_BK in _widened_blocks(weight_NK.shape, weight_NK.__getitem__, weight_NK.device):
        out_MN[:, rows] = F.linear(x_MK, wide_BK)
    if bias_N is not None:
        out_MN += bias_N
    return out_MN.to(out_dtype)


def _join_planes(sums_PMN: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, N] of the sums of each plane, the highest first, in a dtype that holds them exactly."""
    total_MN = sums_PMN[0].to(dtype)
    for lower_MN in sums_PMN[1:]:
        total_MN.mul_(RADIX).add_(lower_MN)
    return total_MN


def _widened_blocks(
    shape: tuple[int, ...], read: Callable[[slice], Tensor], device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with their float32 copy, which the next one overwrites."""
    num_rows, row_size = shape
    block = max(16, BLOCK_BYTES // (4 * max(1, row_size)))
    wide_BK = torch.empty(min(block, num_rows), row_size, dtype=torch.float32, device=device)
    for start in range(0, num_rows, block):
        rows = slice(start, min(start + block, num_rows))
        yield rows, wide_BK[: rows.stop - start].copy_(read(rows))
