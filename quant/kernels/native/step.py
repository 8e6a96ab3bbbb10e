"""What the library computes besides products of quantized weights; each function one pass in C."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant.kernels.native.calls import TYPES, call, is_available, widest
from quant.kv import Int8Store

MAX_CHANNELS, MAX_GROUP = 256, 16  # as in attention.c
_LANES = 8
FLOATS = (torch.float32, torch.bfloat16)


def linear_bfloat16(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`x @ weight.T + bias` of a contiguous bfloat16 weight, [M, N]; for few rows.

    Sums are float32; x, bias and out_dtype are float32 or bfloat16.
    """
    (num_rows, in_features), out_features = x_MK.shape, weight_NK.shape[0]
    assert in_features == weight_NK.shape[1], (x_MK.shape, weight_NK.shape)
    assert bias_N is None or len(bias_N) == out_features, weight_NK.shape
    work = torch.empty(num_rows * (in_features + out_features))
    out_MN = torch.empty(num_rows, out_features, dtype=out_dtype)
    call(
        "bfloat16", widest(), x_MK, TYPES[x_MK.dtype], x_MK.stride(0), num_rows, in_features,
        weight_NK, out_features, bias_N, 0 if bias_N is None else TYPES[bias_N.dtype],
        out_MN, TYPES[out_dtype], work,
    )  # fmt: skip
    return out_MN


def attend(
    q_BHC: Tensor,
    keys_BKLC: Tensor,
    values_BKLC: Tensor,
    positions_B: Tensor,
    window: int | None = None,
) -> Tensor:
    """Decode attention, [B, H, C]: each head's query over the first positions of its sequence.

    Args:
        keys_BKLC, values_BKLC: views of the cache with the same strides; H is a multiple of K.
        positions_B: int64; a query sees its own position and those before it.
        window: how many of these it sees, the last ones; None: all.
    """
    return _attend(q_BHC, keys_BKLC, values_BKLC, positions_B, window, (None, None, 0, 0, 0))


def attend_int8(
    q_BHC: Tensor, store: Int8Store, positions_B: Tensor, window: int | None = None
) -> Tensor:
    """The same over integers, which become floats in registers only.

    Args:
        store: a view by rows.
    """
    strides = (0, 0) if store.is_static else store.key_scale.stride()[:2]
    scales = (store.key_scale, store.value_scale, int(store.is_static), *strides)
    return _attend(q_BHC, store.keys, store.values, positions_B, window, scales)


def _attend(
    q_BHC: Tensor,
    keys_BKLC: Tensor,
    values_BKLC: Tensor,
    positions_B: Tensor,
    window: int | None,
    scales: Any,
) -> Tensor:
    """Args: scales: the fields of the struct from key_scale to scale_head."""
    batch, heads, channels = q_BHC.shape
    num_kv_heads = keys_BKLC.shape[1]
    out_BHC = torch.empty(batch, heads, channels, dtype=q_BHC.dtype)
    call(
        "attend", widest(), q_BHC, TYPES[q_BHC.dtype], *q_BHC.stride()[:2], keys_BKLC, values_BKLC,
        TYPES[keys_BKLC.dtype], *keys_BKLC.stride()[:2], *scales, positions_B, window or 0, batch,
        num_kv_heads, heads // num_kv_heads, channels, out_BHC,
    )  # fmt: skip
    return out_BHC


def write_slots(
    k_THC: Tensor, v_THC: Tensor, slots_T: Tensor, keys_HSC: Tensor, values_HSC: Tensor
) -> None:
    """Store the keys and values of some tokens at their slots of the cache."""
    tokens, heads, channels = k_THC.shape
    size = k_THC.element_size()
    call(
        "write_slots", k_THC, v_THC, k_THC.stride(0) * size, slots_T, tokens, heads,
        channels * size, keys_HSC, values_HSC, keys_HSC.stride(0) * size,
    )  # fmt: skip


def write_int8(k_THC: Tensor, v_THC: Tensor, slots_T: Tensor, store: Int8Store) -> None:
    """Quantize the keys and values of some tokens, and store them at their slots of the cache.

    Args:
        store: a view by slot.
    """
    call(
        "write_int8", widest(), k_THC, v_THC, TYPES[k_THC.dtype], k_THC.stride(0), slots_T,
        *k_THC.shape, store.keys, store.values, store.keys.stride(0), store.key_scale,
        store.value_scale, int(store.is_static), store.key_scale.stride(0),
    )  # fmt: skip


def rms_norm(x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
    """`weight * (x / rms(x))`, after `x += delta` in place where there is one."""
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    call(
        "rms_norm", widest(), x_TD, delta_TD, weight_D, TYPES[x_TD.dtype], *x_TD.shape, eps, out_TD
    )
    return out_TD


def norm_heads(
    x_TE: Tensor, counts: tuple[int, int], weights: tuple[Tensor, Tensor], eps: float
) -> None:
    """Norm the first heads of each row in place: so many with one weight, so many with the other."""
    call(
        "norm_heads", widest(), x_TE, TYPES[x_TE.dtype], x_TE.stride(0), x_TE.shape[0], *counts,
        len(weights[0]), *weights, eps,
    )  # fmt: skip


def silu_product(gate_up_TF: Tensor) -> Tensor:
    """`silu(gate) * up` of rows that hold gate and up side by side, [T, F / 2]."""
    num_rows, width = gate_up_TF.shape
    out_TF = torch.empty(num_rows, width // 2, dtype=gate_up_TF.dtype)
    call("silu_product", widest(), gate_up_TF, TYPES[out_TF.dtype], *out_TF.shape, out_TF)
    return out_TF


def rotate(
    x_TE: Tensor, num_heads: int, cos_LC: Tensor, sin_LC: Tensor, positions_T: Tensor
) -> None:
    """Turn the first heads of each row in place by the angles of its position."""
    call(
        "rotate", widest(), x_TE, TYPES[x_TE.dtype], x_TE.stride(0), x_TE.shape[0], num_heads,
        cos_LC.shape[-1], cos_LC, sin_LC, positions_T,
    )  # fmt: skip


def round_sums(sums_TD: Tensor, bias_D: Tensor | None) -> Tensor:
    """`sums + bias`, float32, rounded to bfloat16 once."""
    out_TD = torch.empty(sums_TD.shape, dtype=torch.bfloat16)
    bias_type = 0 if bias_D is None else TYPES[bias_D.dtype]
    call("round_sums", sums_TD, bias_D, bias_type, *sums_TD.shape, out_TD)
    return out_TD


def takes(*tensors: Tensor) -> bool:
    """Whether the library is there and computes with tensors of this kind: contiguous, on the CPU."""
    first = tensors[0]
    return (
        first.dtype in FLOATS
        and first.device.type == "cpu"
        and all(tensor.dtype == first.dtype and tensor.is_contiguous() for tensor in tensors)
        and is_available()
    )


def can_attend(q_BHC: Tensor, keys_BKLC: Tensor) -> bool:
    """Whether `attend`, of keys in q's dtype, or `attend_int8` takes these, and the library is there."""
    _, heads, channels = q_BHC.shape
    return (
        q_BHC.device.type == "cpu"
        and q_BHC.dtype in FLOATS
        and keys_BKLC.dtype in (q_BHC.dtype, torch.int8)
        and channels % 16 == 0
        and channels <= MAX_CHANNELS
        and heads // keys_BKLC.shape[1] <= MAX_GROUP
        and q_BHC.stride(2) == 1
        and is_available()
    )


def can_write(k_THC: Tensor, v_THC: Tensor, keys_HSC: Tensor, values_HSC: Tensor) -> bool:
    """Whether `write_slots` takes tensors that lie so, and the library is there."""
    channels = k_THC.shape[2]
    return (
        k_THC.dtype == keys_HSC.dtype
        and keys_HSC.stride() == values_HSC.stride()
        and keys_HSC.stride()[1:] == (channels, 1)
        and _lie_side_by_side(k_THC, v_THC)
    )


def can_write_int8(k_THC: Tensor, v_THC: Tensor) -> bool:
    """Whether `write_int8` takes tensors that lie so, and the library is there."""
    return (
        k_THC.dtype in FLOATS and k_THC.shape[2] % _LANES == 0 and _lie_side_by_side(k_THC, v_THC)
    )


def _lie_side_by_side(k_THC: Tensor, v_THC: Tensor) -> bool:
    """Whether k and v are on the CPU, of one dtype, and their heads one after the other."""
    return (
        k_THC.device.type == "cpu"
        and k_THC.dtype == v_THC.dtype
        and k_THC.stride() == v_THC.stride()
        and k_THC.stride()[1:] == (k_THC.shape[2], 1)
        and is_available()
    )
