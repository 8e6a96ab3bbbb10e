"""int4 weights, and int8 ones with a scale for each group of columns, as int4.c multiplies them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.activations import num_levels
from quant.kernels.native.calls import TYPES, call, open_library
from quant.kernels.native.weight import (
    NativeWeight,
    Rows,
    bias_and_type,
    num_planes,
    pack_blocks,
    with_columns,
    with_rows,
)
from quant.packing import BLOCK, EIGHT, grouped_shape
from quant.weight import (
    NibbleWeight,
    PackedWeight,
    StoredWeight,
    form_of,
    joined_shape,
    unpacked,
)

STEP, ROW = 512, 528  # as in int4.c; a step is a multiple of all group sizes
SCALE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 4}


class GroupedNativeWeight(NativeWeight):
    """Eights of columns of 32 channels side by side, and the scales of their groups as they are stored.

    An int4 weight with one scale a channel is one group, whose sums stay integers.
    """

    def __init__(self, parts: Sequence[StoredWeight], set_index: int) -> None:
        forms = [form_of(part) for part in parts]
        weight, self.shape = forms[0], joined_shape(forms)
        size = weight.group_size or 0
        assert size == 0 or (size % EIGHT == 0 and STEP % size == 0), weight.scheme
        assert min(self.shape) > 0, self.shape
        self._set_index, self._bits = set_index, weight.bits
        # Groups begin at a multiple of 8 of the packed columns.
        self._before = weight.first_column % EIGHT
        self._first = weight.first_column - self._before
        self.packed = _pack(parts, self.shape, weight.bits, self._before)
        self.group_size, self.activation_dtype = weight.group_size, weight.activation_dtype
        self.input_scale, self.input_zero_point = weight.input_scale, weight.input_zero_point
        scale_NG = torch.cat([form.scale_NG for form in forms])
        self._scales: Tensor | None = None
        self.scale_N = torch.ones(1).expand(self.shape[0])
        if size:
            self._scales = _block_scales(scale_NG)
        else:
            self.scale_N = scale_NG.float().reshape(-1)
        held = self.scale_N if self._scales is None else self._scales
        self.nbytes = self.packed.nbytes + held.nbytes

    def linear(self, x_MK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        if self.input_scale is not None:  # rare: torch rounds the rows
            return PackedWeight.linear(self, x_MK, bias_N, out_dtype)
        return super().linear(x_MK, bias_N, out_dtype)

    def _multiply(
        self, x_MK: Tensor, amax_M: Tensor | None, bias_N: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        levels = num_levels(x_MK.dtype, self.activation_dtype)
        x_MK = with_rows(x_MK)
        num_rows, in_features = x_MK.shape
        assert in_features == self.shape[1], (x_MK.shape, self.shape)
        num_steps = -(-(self._first + self._before + in_features) // STEP)
        work_size = num_rows * (num_planes(levels) * 2 * num_steps * ROW + 4)
        work = torch.empty(work_size, dtype=torch.uint8)
        out_MN = torch.empty(num_rows, self.shape[0], dtype=out_dtype)
        is_grouped = self._scales is not None
        call(
            "int4", self._set_index, x_MK, TYPES[x_MK.dtype], x_MK.stride(0), amax_M,
            num_rows, in_features, levels, self.packed, self._bits, self.shape[0], self._before,
            self.group_size or 0, self._first, self._scales,
            SCALE_TYPES[self._scales.dtype] if self._scales is not None else 0,
            None if is_grouped else self.scale_N, *bias_and_type(bias_N, self.shape[0]),
            out_MN, TYPES[out_dtype], int(amax_M is not None), work,
        )  # fmt: skip
        return out_MN


def _pack(parts: Sequence[StoredWeight], shape: tuple[int, int], bits: int, before: int) -> Tensor:
    """[blocks, columns / 8, 32, bytes], with zeros for the columns that the eights lack."""
    packed = torch.empty(grouped_shape(shape[0], before + shape[1], bits), dtype=torch.uint8)
    num_columns = EIGHT * packed.shape[1]
    rows = (_rows(part, before, num_columns) for part in parts)
    pack_blocks(rows, packed, (shape[0], num_columns))
    return packed


def _rows(part: StoredWeight, before: int, num_columns: int) -> Rows:
    """A part as C packs it: as it is stored, where its eights are those of the packed columns."""
    library = open_library()
    if isinstance(part, NibbleWeight) and num_columns == part.form.shape[1]:
        return library.shardrun_pack_nibbles, with_columns(part.nibbles_NB)
    weight = unpacked(part)
    values_NK = with_columns(weight.values_NK)
    if num_columns > weight.shape[1]:
        values_NK = F.pad(values_NK, (before, num_columns - before - weight.shape[1]))
    return (
        library.shardrun_pack_int4 if weight.bits == 4 else library.shardrun_pack_pairs,
        values_NK,
    )


def _block_scales(scale_NG: Tensor) -> Tensor:
    """[blocks, groups, 32], zeros for the channels that the last block lacks."""
    if scale_NG.dtype not in SCALE_TYPES:
        scale_NG = scale_NG.float()
    missing = -scale_NG.shape[0] % BLOCK
    padded_NG = F.pad(scale_NG, (0, 0, 0, missing))
    return padded_NG.unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()
