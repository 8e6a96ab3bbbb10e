"""What lies between the products of a layer: norm, activation and rotary angles, in one pass each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.kernels.native import step as native

_LANES = 8


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, delta_TD: Tensor | None = None) -> Tensor:
    """`weight * (x / rms(x))`, the quotient rounded to x's dtype before the weight (Zhang and Sennrich,
    2019; the rounding is that of transformers).

    Args:
        delta_TD: added to x, in place, before: the residual sum.
    """
    given = (x_TD, weight_D) if delta_TD is None else (x_TD, weight_D, delta_TD)
    if x_TD.shape[-1] % _LANES == 0 and native.takes(*given):
        return native.rms_norm(x_TD, delta_TD, weight_D, eps)
    if delta_TD is not None:
        x_TD.add_(delta_TD)
    return weight_D * torch.rms_norm(x_TD, weight_D.shape, None, eps)


def norm_heads(
    x_TE: Tensor, counts: tuple[int, int], weights: tuple[Tensor, Tensor], eps: float
) -> None:
    """Norm the first heads of each row in place, each head by itself: as many as `counts` says with
    the first weight, then with the second (q and k of Qwen3). Rounded as `rms_norm` is.

    Args:
        x_TE: [tokens, at least sum(counts) * C].
        weights: [C] each.
    """
    channels = len(weights[0])
    if channels % _LANES == 0 and native.takes(x_TE, *weights):
        native.norm_heads(x_TE, counts, weights, eps)
        return
    x_THC = x_TE[:, : sum(counts) * channels].unflatten(1, (sum(counts), channels))
    for heads_THC, weight_C in zip(x_THC.split(counts, dim=1), weights, strict=True):
        heads_THC.copy_(weight_C * torch.rms_norm(heads_THC, weight_C.shape, None, eps))


def silu_product(gate_up_TF: Tensor, sizes: tuple[int, int]) -> Tensor:
    """`silu(gate) * up` of rows that hold gate and up side by side (SwiGLU: Shazeer, 2020)."""
    if sizes[0] % _LANES == 0 and sizes[0] == sizes[1] and native.takes(gate_up_TF):
        return native.silu_product(gate_up_TF)
    gate_TF, up_TF = gate_up_TF.split(sizes, dim=1)
    return F.silu(gate_TF).mul_(up_TF)


def rotate(
    x_TE: Tensor, num_heads: int, cos_L1C: Tensor, sin_L1C: Tensor, positions_T: Tensor
) -> None:
    """Turn the first heads of each row by the rotary angles of its position, in place.

    Args:
        x_TE: [tokens, at least num_heads * C].
        cos_L1C, sin_L1C: of every position; the first half of the sines is negative.
    """
    channels = cos_L1C.shape[-1]
    if channels % (2 * _LANES) == 0 and native.takes(x_TE, cos_L1C, sin_L1C):
        native.rotate(x_TE, num_heads, cos_L1C, sin_L1C, positions_T)
        return
    x_THC = x_TE[:, : num_heads * channels].unflatten(1, (num_heads, channels))
    turned_THC = x_THC.roll(channels // 2, -1)
    x_THC.mul_(cos_L1C[positions_T]).addcmul_(turned_THC, sin_L1C[positions_T])


def round_sums(sums_TD: Tensor, bias_D: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`sums + bias` of float32 sums, rounded to `dtype` once."""
    given = (sums_TD,) if bias_D is None else (sums_TD, bias_D.float())
    if dtype == torch.bfloat16 and native.takes(*given):
        return native.round_sums(sums_TD, bias_D)
    return (sums_TD if bias_D is None else sums_TD + bias_D).to(dtype)
