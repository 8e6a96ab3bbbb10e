"""Attention of one new token of each sequence over its keys and values in the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from quant.kernels.native import step as native
from quant.kv import Int8Store


def decode_attention(
    q_BHC: Tensor,
    keys_BKLC: Tensor,
    values_BKLC: Tensor,
    positions_B: Tensor,
    mask: Callable[[], Tensor | None],
    window: int | None = None,
) -> Tensor:
    """`softmax(q . keys / sqrt(C)) . values`, [B, H, C] in q's dtype, sums in float32.

    The H query heads share the K kv heads in order, H / K each; keys are read where they lie.

    Args:
        keys_BKLC, values_BKLC: views of the cache, the same strides.
        positions_B: int64; a query sees its own position and those before it.
        mask: gives the same, and the window, as something to add to the scores, [B, 1, 1, L], or
            None where all of L is seen; asked only where torch attends.
        window: how many positions a query sees, its own included; None: all before it.
    """
    if native.can_attend(q_BHC, keys_BKLC):
        return native.attend(q_BHC, keys_BKLC, values_BKLC, positions_B, window)
    return _attend_by_torch(q_BHC, keys_BKLC, values_BKLC, mask())


def int8_decode_attention(
    q_BHC: Tensor,
    store: Int8Store,
    positions_B: Tensor,
    mask: Callable[[], Tensor | None],
    window: int | None = None,
) -> Tensor:
    """The same over int8 keys and values; q is not quantized.

    C reads the integers as they are; torch expands them first.

    Args:
        store: a view by rows, of L positions.
    """
    if native.can_attend(q_BHC, store.keys):
        return native.attend_int8(q_BHC, store, positions_B, window)
    return _attend_by_torch(q_BHC, *store.dequantize(q_BHC.dtype), mask())


def _attend_by_torch(
    q_BHC: Tensor, keys_BKLC: Tensor, values_BKLC: Tensor, mask: Tensor | None
) -> Tensor:
    q_BKGC = q_BHC.unflatten(1, (keys_BKLC.shape[1], -1))
    num_groups = q_BKGC.shape[2]
    if num_groups == 1 and q_BKGC.device.type == "cpu" and q_BKGC.itemsize == 2:
        # torch multiplies two rows of 16 bits in half the time of one.
        q_BKGC = q_BKGC.expand(-1, -1, 2, -1)
    out_BKGC = F.scaled_dot_product_attention(q_BKGC, keys_BKLC, values_BKLC, mask)
    return out_BKGC[:, :, :num_groups].flatten(1, 2)


def write_slots(
    k_THC: Tensor, v_THC: Tensor, slots_T: Tensor, keys_HSC: Tensor, values_HSC: Tensor
) -> None:
    """Store the keys and values of some tokens at their slots of the cache, all of one dtype.

    Heads of k and v lie one after the other; those of the cache need not.
    """
    if native.can_write(k_THC, v_THC, keys_HSC, values_HSC):
        native.write_slots(k_THC, v_THC, slots_T, keys_HSC, values_HSC)
        return
    keys_HSC.index_copy_(1, slots_T, k_THC.transpose(0, 1))
    values_HSC.index_copy_(1, slots_T, v_THC.transpose(0, 1))


def write_int8_slots(k_THC: Tensor, v_THC: Tensor, slots_T: Tensor, store: Int8Store) -> None:
    """Quantize the keys and values of some tokens, and store them at their slots of the cache.

    Args:
        store: a view by slot. C and torch write the same bits.
    """
    if native.can_write_int8(k_THC, v_THC):
        native.write_int8(k_THC, v_THC, slots_T, store)
    else:
        store.write(k_THC, v_THC, slots_T)
