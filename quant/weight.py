"""A quantized weight: its named parts, and the form a kernel wants it in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.activations import (
    LEVELS_INT8,
    STATIC_HIGHEST,
    STATIC_LOWEST,
    finish,
    num_levels,
    quantize_static,
    row_amax,
    row_scale,
)
from quant.numeric import dequantize, unpack_int4
from quant.scheme import LinearScheme


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer weight of one linear, with a scale for each group of each output channel.

    Attributes:
        values_NK: int8 [out_features, in_features], also where each has 4 bits.
        scale_NG: [out_features, groups], the checkpoint's dtype; one group where a row has one scale.
        activation_dtype: "int8" where its product quantizes the activations too, else None.
        bits: 8 or 4.
        group_size: columns that share a scale; None: a whole row does.
        first_column: the place of column 0 within its group: a rank's part may begin inside one.
        input_scale: float32 [1], of static int8 activations; None: they are none, or dynamic.
        input_zero_point: the integer that stands for zero in static activations, -128 to 127; 0
            where they are symmetric.
    """

    values_NK: Tensor
    scale_NG: Tensor
    activation_dtype: str | None = None
    bits: int = 8
    group_size: int | None = None
    first_column: int = 0
    input_scale: Tensor | None = None
    input_zero_point: int = 0

    def __post_init__(self) -> None:
        shape = (self.values_NK.shape[0], self.num_groups)
        assert self.scale_NG.shape == shape, (self.scale_NG.shape, shape)
        if self.input_scale is not None:
            assert self.activation_dtype == "int8", "static activations are int8"
            assert self.input_scale.shape == (1,), self.input_scale.shape
            assert self.input_scale.dtype == torch.float32, self.input_scale.dtype
        assert self.input_scale is not None or self.input_zero_point == 0, "no static activations"
        assert STATIC_LOWEST <= self.input_zero_point <= STATIC_HIGHEST, self.input_zero_point

    @property
    def shape(self) -> torch.Size:
        return self.values_NK.shape

    @property
    def scheme(self) -> LinearScheme:
        granularity = "per_token" if self.input_scale is None else "per_tensor"
        return LinearScheme(f"int{self.bits}", self.group_size, self.activation_dtype, granularity)

    @property
    def num_groups(self) -> int:
        """Groups that the columns touch."""
        if self.group_size is None:
            return 1
        return -(-(self.first_column + self.shape[1]) // self.group_size)

    @property
    def nbytes(self) -> int:
        parts = (self.values_NK, self.scale_NG, self.input_scale)
        return sum(part.nbytes for part in parts if part is not None)

    def columns(self, start: int, stop: int) -> QuantizedWeight:
        """The columns [start, stop), contiguous, with the scales of the groups that they touch."""
        values_NK = self.values_NK[:, start:stop].contiguous()
        if self.group_size is None:
            return replace(self, values_NK=values_NK)
        first, last = self.first_column + start, self.first_column + stop
        groups = slice(first // self.group_size, -(-last // self.group_size))
        return replace(
            self,
            values_NK=values_NK,
            scale_NG=self.scale_NG[:, groups].contiguous(),
            first_column=first % self.group_size,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features] in `dtype`; for tests and reports, never in a step."""
        return dequantize(self.values_NK, self.scale_NG, dtype, self.group_size, self.first_column)

    def to(self, device: torch.device) -> QuantizedWeight:
        return replace(
            self,
            values_NK=self.values_NK.to(device),
            scale_NG=self.scale_NG.to(device),
            input_scale=None if self.input_scale is None else self.input_scale.to(device),
        )


class PackedWeight(ABC):
    """A quantized weight in the layout of one kernel, packed once at load.

    Its source may be freed then. Safe to use from several threads at once.

    Attributes:
        shape: (out_features, in_features).
        nbytes: bytes that are held, and read by a product.
        scale_N: float32 [out_features]; ones where the sums of groups are scaled already.
        activation_dtype: as in QuantizedWeight.
        group_size: as in QuantizedWeight; says what `sums` gives.
        input_scale: as in QuantizedWeight; where there is one, `static_sums` and `finish_static`
            stand in for `row_amax`, `sums` and `finish`, which know no static scale.
        input_zero_point: as in QuantizedWeight.
    """

    shape: tuple[int, int]
    nbytes: int
    scale_N: Tensor
    activation_dtype: str | None
    group_size: int | None = None
    input_scale: Tensor | None = None
    input_zero_point: int = 0

    @abstractmethod
    def sums(self, x_MK: Tensor, amax_M: Tensor) -> Tensor:
        """What is still to be scaled by the row, [M, out_features]; those of parts of a row add up.

        Of weights with one scale a channel the integer sums `q @ values.T`, int64 (int32 for int8
        activations): the order in which they are added changes nothing. Of grouped weights float32,
        each group's integer sum times its scale, added up in the order of the groups: parts of a
        row are equal but for the rounding of their sum.

        Args:
            amax_M: float32, the largest absolute value of each row, which x may be a part of.
        """

    def row_amax(self, x_MK: Tensor) -> Tensor:
        """float32 [M]: the largest absolute value of each row; NaN where a row holds one."""
        return row_amax(x_MK)

    def linear(self, x_MK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """`x @ weight.T + bias` as `out_dtype`, [M, out_features]; rounded to it once."""
        if self.input_scale is not None:
            return self.finish_static(self.static_sums(x_MK), bias_N, out_dtype)
        amax_M = self.row_amax(x_MK)
        return self.finish(self.sums(x_MK, amax_M), amax_M, bias_N, x_MK.dtype, out_dtype)

    def finish(
        self,
        sums_MN: Tensor,
        amax_M: Tensor,
        bias_N: Tensor | None,
        x_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """The product that the sums stand for; those of parts of a row may be added before."""
        levels = num_levels(x_dtype, self.activation_dtype)
        return finish(sums_MN, row_scale(amax_M, levels), self.scale_N, bias_N, out_dtype)

    def static_sums(self, x_MK: Tensor) -> Tensor:
        """The sums of static activations and what makes NaN of a row, as one tensor [M * (N + 1)].

        First come the sums, as `sums` gives them, row by row; then for each row 1 where x holds an
        infinity or a NaN, which no integer sum can say, else 0. Those of parts of a row add up: one
        all-reduce is all that ranks need.
        """
        assert self.input_scale is not None, "dynamic activations"
        q_MK, row_scale_M = quantize_static(x_MK, self.input_scale, self.input_zero_point)
        sums_MN = self.sums_of_integers(q_MK)
        return torch.cat([sums_MN.flatten(), row_scale_M.isnan().to(sums_MN.dtype)])

    def sums_of_integers(self, q_MK: Tensor) -> Tensor:
        """`sums` of activations that are whole numbers already, within +-255."""
        # Rows of whole numbers whose largest value is said to be 127 are their own integers.
        return self.sums(q_MK, q_MK.new_full((q_MK.shape[0],), LEVELS_INT8))

    def finish_static(
        self, static_sums: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        """The product, [M, out_features], that `static_sums` stand for, or the total of parts'."""
        assert self.input_scale is not None, "dynamic activations"
        sums_MN, damaged_M = split_static(static_sums, self.shape[0])
        row_scale_M = torch.where(damaged_M == 0, self.input_scale, torch.nan)
        return finish(sums_MN, row_scale_M, self.scale_N, bias_N, out_dtype)


def split_static(static_sums: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
    """Views of the two parts of static sums: [M, N], and for each row whether it is damaged, [M]."""
    num_rows = len(static_sums) // (out_features + 1)
    num_sums = num_rows * out_features
    return static_sums[:num_sums].view(num_rows, out_features), static_sums[num_sums:]


@dataclass(frozen=True)
class NibbleWeight:
    """An int4 weight whose values are still as they are stored, two a byte.

    A kernel that packs nibbles takes it so: its integers, a byte each, need never be in memory.

    Attributes:
        nibbles_NB: uint8 [out_features, ceil(in_features / 2)], as `pack_int4` gives them.
        form: the weight that it becomes; its values are on `meta` and have a shape only.
    """

    nibbles_NB: Tensor
    form: QuantizedWeight

    def __post_init__(self) -> None:
        num_rows, num_columns = self.form.shape
        shape = (num_rows, -(-num_columns // 2))
        assert self.nibbles_NB.shape == shape, (self.nibbles_NB.shape, self.form.shape)

    def to(self, device: torch.device) -> NibbleWeight:
        return replace(self, nibbles_NB=self.nibbles_NB.to(device))


Weight = Tensor | QuantizedWeight
StoredWeight = QuantizedWeight | NibbleWeight
ReadyWeight = Weight | PackedWeight


def form_of(weight: StoredWeight) -> QuantizedWeight:
    """What a weight is; its values may have a shape only."""
    return weight.form if isinstance(weight, NibbleWeight) else weight


def unpacked(weight: StoredWeight) -> QuantizedWeight:
    """The weight with a byte for each of its values."""
    if isinstance(weight, QuantizedWeight):
        return weight
    values_NK = unpack_int4(weight.nibbles_NB, weight.form.shape[1])
    return replace(weight.form, values_NK=values_NK).to(values_NK.device)


def joined_shape(parts: Sequence[QuantizedWeight]) -> tuple[int, int]:
    """Of weights of the same input as one."""
    return sum(part.shape[0] for part in parts), parts[0].shape[1]


def check_alike(parts: Sequence[QuantizedWeight]) -> None:
    """Weights of the same input that become one must be quantized alike."""
    kinds = {(part.scheme, part.first_column, part.shape[1]) for part in parts}
    assert len(kinds) == 1, f"one product, one scheme, but {kinds}"
    assert len(set(input_scales(parts))) <= 1, "one input, one scale"
    assert len(set(input_zero_points(parts))) <= 1, "one input, one zero point"


def fuse(weights: Sequence[Weight]) -> Weight:
    """Weights of the same input as one, their output channels one after the other: q, k, v."""
    if len(weights) == 1:
        return weights[0]
    if all(isinstance(weight, QuantizedWeight) for weight in weights):
        parts = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
        check_alike(parts)
        return replace(
            parts[0],
            values_NK=torch.cat([part.values_NK for part in parts]),
            scale_NG=torch.cat([part.scale_NG for part in parts]),
        )
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    assert len(tensors) == len(weights), "weights of one fused product are quantized all or none"
    return torch.cat(tensors)


def input_scales(weights: Sequence[StoredWeight]) -> list[float]:
    """The scales of those with static activations; parts of one product must have the same."""
    return [float(scale) for scale, _ in _static_inputs(weights)]


def input_zero_points(weights: Sequence[StoredWeight]) -> list[int]:
    """The zero points of those with static activations; parts of one product must have the same."""
    return [zero_point for _, zero_point in _static_inputs(weights)]


def _static_inputs(weights: Sequence[StoredWeight]) -> list[tuple[Tensor, int]]:
    return [
        (form.input_scale, form.input_zero_point)
        for form in map(form_of, weights)
        if form.input_scale is not None
    ]
