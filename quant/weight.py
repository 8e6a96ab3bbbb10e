"""A quantized weight: its named parts, and nothing else."""

from __future__ import annotations

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


Weight = Tensor | QuantizedWeight
