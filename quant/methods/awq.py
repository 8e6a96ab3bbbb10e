"""AWQ: channels that carry large activations get finer weights.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023).
The scale of a channel is `mean|x|^r / mean|w|^(1 - r)`, as in its authors' code ("duo scaling"), w
relative to the largest value of its group and the whole divided by the root of its largest and
smallest value. r is searched on a grid; each candidate is judged by what the block that the products
belong to, attention or MLP, gives with rounded weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quant.inputs import INPUTS
from quant.methods.folding import share
from quant.methods.layer import Layer, blocks
from quant.numeric import Grid

NUM_RATIOS = 20
LEAST_SCALE = 1e-4


def awq_scales(layer: Layer, name: str, input_mean_K: Tensor, grid: Grid) -> list[Tensor]:
    """The candidates, float32 [K] each: no scale at all, and one for each ratio of 0, 1/20 .. 19/20.

    Args:
        name: which input: one of quant.inputs.INPUTS.
        input_mean_K: float32 [K], the mean absolute value of each channel on the samples.
    """
    mean_K = share(layer, name, input_mean_K).double()
    weight_K = share(layer, name, relative_weight_mean(layer, name, grid)).double()
    ratios = [step / NUM_RATIOS for step in range(NUM_RATIOS)]
    return [torch.ones_like(input_mean_K), *(_scale(mean_K, weight_K, r) for r in ratios)]


def relative_weight_mean(layer: Layer, name: str, grid: Grid) -> Tensor:
    """float32 [K]: the mean over all rows of |w| / (largest |w| of its group)."""
    products = [layer.products[product] for product in INPUTS[name]]
    total_K = torch.zeros(products[0].shape[1], dtype=torch.float64)
    for product in products:
        for rows in blocks(product.shape[0]):
            total_K += _relative(product.rows(rows).abs(), grid).sum(dim=0, dtype=torch.float64)
    return (total_K / sum(product.shape[0] for product in products)).float()


def best_scale(candidates: list[Tensor], loss: Callable[[Tensor], float]) -> Tensor:
    """The candidate of the least loss, the first of equals."""
    losses = [loss(scale_K) for scale_K in candidates]
    return candidates[losses.index(min(losses))]


def _relative(weight_RK: Tensor, grid: Grid) -> Tensor:
    size = grid.group_size or weight_RK.shape[1]
    groups = [
        part / part.amax(dim=1, keepdim=True).clamp(min=1e-6) for part in weight_RK.split(size, 1)
    ]
    return torch.cat(groups, dim=1)


def _scale(mean_K: Tensor, weight_K: Tensor, ratio: float) -> Tensor:
    scale_K = mean_K**ratio / (weight_K ** (1 - ratio) + 1e-4)
    scale_K = scale_K.clamp(min=LEAST_SCALE)
    scale_K = scale_K / (scale_K.max() * scale_K.min()).sqrt()
    known_K = (mean_K > 0) & scale_K.isfinite()
    return torch.where(known_K, scale_K, 1.0).float()
