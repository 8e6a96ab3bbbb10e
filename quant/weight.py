"""A quantized weight: its named parts, and the form a kernel wants it in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.activations import finish, num_levels, row_amax, row_scale
from quant.numeric import dequantize


@dataclass(frozen=True)
class QuantizedWeight:
    """int8 weight of one linear with a scale for each output channel.

    Attributes:
        values_NK: int8 [out_features, in_features].
        scale_N: [out_features, 1], the checkpoint's dtype.
        activation_dtype: "int8" where its product quantizes the activations too, else None.
    """

    values_NK: Tensor
    scale_N: Tensor
    activation_dtype: str | None = None

    @property
    def shape(self) -> torch.Size:
        return self.values_NK.shape

    @property
    def nbytes(self) -> int:
        return self.values_NK.nbytes + self.scale_N.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features] in `dtype`; for tests and reports, never in a step."""
        return dequantize(self.values_NK, self.scale_N, dtype)

    def to(self, device: torch.device) -> QuantizedWeight:
        return replace(self, values_NK=self.values_NK.to(device), scale_N=self.scale_N.to(device))


class PackedWeight(ABC):
    """A quantized weight in the layout of one kernel, packed once at load.

    Its source may be freed then. Safe to use from several threads at once.

    Attributes:
        shape: (out_features, in_features).
        nbytes: bytes that are held, and read by a product.
        scale_N: float32 [out_features].
        activation_dtype: as in QuantizedWeight.
    """

    shape: tuple[int, int]
    nbytes: int
    scale_N: Tensor
    activation_dtype: str | None

    @abstractmethod
    def sums(self, x_MK: Tensor, amax_M: Tensor) -> Tensor:
        """The integer sums `q @ values.T`, int64 [M, out_features] (int32 for int8 activations).

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
        """The product that integer sums stand for; those of parts of a row may be added before."""
        levels = num_levels(x_dtype, self.activation_dtype)
        return finish(sums_MN, row_scale(amax_M, levels), self.scale_N, bias_N, out_dtype)


Weight = Tensor | QuantizedWeight
ReadyWeight = Weight | PackedWeight


def fuse(weights: Sequence[Weight]) -> Weight:
    """Weights of the same input as one, their output channels one after the other: q, k, v."""
    if all(isinstance(weight, QuantizedWeight) for weight in weights):
        parts = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
        assert len({part.activation_dtype for part in parts}) == 1, "one product, one scheme"
        return QuantizedWeight(
            torch.cat([part.values_NK for part in parts]),
            torch.cat([part.scale_N for part in parts]),
            parts[0].activation_dtype,
        )
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    assert len(tensors) == len(weights), "weights of one fused product are quantized all or none"
    return torch.cat(tensors)
