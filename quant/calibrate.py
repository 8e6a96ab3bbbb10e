"""Observers: what calibration keeps of the activations that enter a product.

An observer is filled by the samples of one rank. What it needs of the other ranks is data, not a
collective call: `state()` names its tensors and how they are put together. "max" is exact in any
order; an "ordered_sum" must be added up block of samples by block of samples, in block order, so
that the result has the same bits whatever the number of ranks. `tests/test_calibration.py` shows it.

Shape suffixes: T tokens, K channels of the input, H kv heads, C head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

State = Mapping[str, tuple[Tensor, str]]
Reduced = Mapping[str, Tensor]

# Rows of a Hessian that are computed at a time. Fixed, as a product's bits may depend on its shape.
STRIP_ROWS = 512


class Observer(Protocol):
    """Keeps something of the inputs it is shown.

    Its state starts as zeros, which change neither a maximum of absolute values nor a sum: whoever
    has put the state together with the other ranks' zeroes it and goes on.
    """

    def update(self, x_TK: Tensor) -> None:
        """Take up one sample's input."""
        ...

    def state(self) -> State:
        """name -> (tensor, "max" or "ordered_sum"); the observer's own tensors, not copies."""
        ...


class ChannelAmax:
    """float32 [K]: the largest absolute value of each channel, `amax`."""

    def __init__(self, num_channels: int) -> None:
        self.amax_K = torch.zeros(num_channels)

    def update(self, x_TK: Tensor) -> None:
        torch.maximum(self.amax_K, x_TK.abs().amax(dim=0).float(), out=self.amax_K)

    def state(self) -> State:
        return {"amax": (self.amax_K, "max")}


class TensorAmax:
    """float32 [1]: the largest absolute value of the whole input, `amax`; for static activations."""

    def __init__(self) -> None:
        self.amax_1 = torch.zeros(1)

    def update(self, x_TK: Tensor) -> None:
        torch.maximum(self.amax_1, x_TK.abs().amax().float(), out=self.amax_1)

    def state(self) -> State:
        return {"amax": (self.amax_1, "max")}


class KeyValueAmax:
    """float32 [H, C] each: `key` and `value`, the largest absolute values after the rotary turn."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        self.amax_2HC = torch.zeros(2, num_heads, head_dim)

    def update(self, x_TK: Tensor) -> None:
        """x: [T, 2, H, C], keys and values."""
        torch.maximum(self.amax_2HC, x_TK.abs().amax(dim=0).float(), out=self.amax_2HC)

    def state(self) -> State:
        return {"key": (self.amax_2HC[0], "max"), "value": (self.amax_2HC[1], "max")}


class ChannelMean:
    """float64: `sum` [K] of the absolute values of each channel, and `count` [1] of the tokens."""

    def __init__(self, num_channels: int) -> None:
        self.sum_K = torch.zeros(num_channels, dtype=torch.float64)
        self.count_1 = torch.zeros(1, dtype=torch.float64)

    def update(self, x_TK: Tensor) -> None:
        self.sum_K += x_TK.abs().sum(dim=0, dtype=torch.float64)
        self.count_1 += len(x_TK)

    def state(self) -> State:
        return {"sum": (self.sum_K, "ordered_sum"), "count": (self.count_1, "ordered_sum")}


def channel_mean(reduced: Reduced) -> Tensor:
    """float32 [K]: the mean absolute value of each channel (AWQ)."""
    return (reduced["sum"] / reduced["count"].clamp(min=1)).float()


class Hessian:
    """float32 [K, K]: `hessian`, the sum of x x^T over the tokens (GPTQ), lower triangle only.

    Sums are added token by token of one sample in one product, sample after sample; the products
    have fixed shapes, so their bits do not depend on who computes them.
    """

    def __init__(self, num_channels: int) -> None:
        self.hessian_KK = torch.zeros(num_channels, num_channels)

    def update(self, x_TK: Tensor) -> None:
        x_TK = x_TK.float()
        for strip_RK in self.hessian_KK.split(STRIP_ROWS):
            first = strip_RK.storage_offset() // self.hessian_KK.shape[1]
            last = first + len(strip_RK)
            strip_RK[:, :last].addmm_(x_TK[:, first:last].T, x_TK[:, :last])

    def state(self) -> State:
        return {"hessian": (self.hessian_KK, "ordered_sum")}
