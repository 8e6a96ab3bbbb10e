"""A quantized weight: its named parts, and the form a kernel wants it in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.numeric import dequantize


@dataclass(frozen=True)
class QuantizedWeight:
    """int8 weight of one linear with a scale for each output channel.

    Attributes:
        values_NK: int8 [out_features, in_features].
        scale_N: [out_features, 1], the checkpoint's dtype.
    """

    values_NK: Tensor
    scale_N: Tensor

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
        return QuantizedWeight(self.values_NK.to(device), self.scale_N.to(device))


class PackedWeight(ABC):
    """A weight in the layout of one kernel, packed once at load; the source may then be freed.

    Attributes:
        shape: (out_features, in_features).
        nbytes: bytes that are held, and read by a product.
    """

    shape: tuple[int, int]
    nbytes: int

    @abstractmethod
    def linear(self, x_MK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """`x @ weight.T + bias` as `out_dtype`, [M, out_features]; rounded to it once."""


Weight = Tensor | QuantizedWeight
ReadyWeight = Weight | PackedWeight


def fuse(weights: Sequence[Weight]) -> Weight:
    """Weights of the same input as one, their output channels one after the other: q, k, v."""
    if all(isinstance(weight, QuantizedWeight) for weight in weights):
        parts = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
        return QuantizedWeight(
            torch.cat([part.values_NK for part in parts]),
            torch.cat([part.scale_N for part in parts]),
        )
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    assert len(tensors) == len(weights), "weights of one fused product are quantized all or none"
    return torch.cat(tensors)
