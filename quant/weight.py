"""A quantized weight: its named parts, and the form a kernel wants it in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.activations import finish, num_levels, row_amax, row_scale
from quant.numeric import dequantize
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
    """

    values_NK: Tensor
    scale_NG: Tensor
    activation_dtype: str | None = None
    bits: int = 8
    group_size: int | None = None
    first_column: int = 0

    def __post_init__(self) -> None:
        shape = (self.values_NK.shape[0], self.num_groups)
        assert self.scale_NG.shape == shape, (self.scale_NG.shape, shape)

    @property
    def shape(self) -> torch.Size:
        return self.values_NK.shape

    @property
    def scheme(self) -> LinearScheme:
        return LinearScheme(f"int{self.bits}", self.group_size, self.activation_dtype)

    @property
    def num_groups(self) -> int:
        """Groups that the columns touch."""
        if self.group_size is None:
            return 1
        return -(-(self.first_column + self.shape[1]) // self.group_size)

    @property
    def nbytes(self) -> int:
        return self.values_NK.nbytes + self.scale_NG.nbytes

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
        return replace(self, values_NK=self.values_NK.to(device), scale_NG=self.scale_NG.to(device))


class PackedWeight(ABC):
    """A quantized weight in the layout of one kernel, packed once at load.

    Its source may be freed then. Safe to use from several threads at once.

    Attributes:
        shape: (out_features, in_features).
        nbytes: bytes that are held, and read by a product.
        scale_N: float32 [out_features]; ones where the sums of groups are scaled already.
        activation_dtype: as in QuantizedWeight.
        group_size: as in QuantizedWeight; says what `sums` gives.
    """

    shape: tuple[int, int]
    nbytes: int
    scale_N: Tensor
    activation_dtype: str | None
    group_size: int | None = None

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


Weight = Tensor | QuantizedWeight
ReadyWeight = Weight | PackedWeight


def fuse(weights: Sequence[Weight]) -> Weight:
    """Weights of the same input as one, their output channels one after the other: q, k, v."""
    if all(isinstance(weight, QuantizedWeight) for weight in weights):
        parts = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
        kinds = {(part.scheme, part.first_column) for part in parts}
        assert len(kinds) == 1, f"one product, one scheme, but {kinds}"
        return replace(
            parts[0],
            values_NK=torch.cat([part.values_NK for part in parts]),
            scale_NG=torch.cat([part.scale_NG for part in parts]),
        )
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    assert len(tensors) == len(weights), "weights of one fused product are quantized all or none"
    return torch.cat(tensors)
