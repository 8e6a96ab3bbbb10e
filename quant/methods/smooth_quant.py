"""SmoothQuant: part of the activations' range is moved into the weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models" (2022), equation 4: `s_k = max|x_k|^alpha / max|w_k|^(1 - alpha)`, x is divided by s, the
columns of w are multiplied by it. Unlike the paper's code, o_proj and down_proj can be smoothed too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.methods.folding import fold, share, weight_amax
from quant.methods.layer import Layer

# Neither a silent channel nor a column of zeros may ask for a scale without bound.
LEAST_AMAX = 1e-5
LEAST_SCALE, MOST_SCALE = 1e-5, 1e5


def smooth(layer: Layer, name: str, input_amax_K: Tensor, alpha: float) -> None:
    """Fold SmoothQuant's scale into the layer.

    Args:
        name: which input: one of quant.methods.layer.INPUTS.
        input_amax_K: float32 [K], the largest absolute value of each channel on the samples.
        alpha: how much of the range goes to the weights, 0 to 1.
    """
    amax_K = share(layer, name, input_amax_K)
    fold(layer, name, smooth_scale(amax_K, weight_amax(layer, name), alpha))


def smooth_scale(input_amax_K: Tensor, weight_amax_K: Tensor, alpha: float) -> Tensor:
    """`amax_x^alpha / amax_w^(1 - alpha)`, float32 [K], computed in float64.

    Both maxima are at least 1e-5, and so is the scale, which is at most 1e5. A channel that is
    silent on every sample keeps the scale 1: nothing is known of it.
    """
    input_K, weight_K = input_amax_K.double(), weight_amax_K.double()
    scale_K = input_K.clamp(min=LEAST_AMAX) ** alpha / weight_K.clamp(min=LEAST_AMAX) ** (1 - alpha)
    scale_K = scale_K.clamp(LEAST_SCALE, MOST_SCALE)
    return torch.where((input_K > 0) & (weight_K > 0), scale_K, 1.0).float()
