"""Attention of one new token of each sequence over its keys and values in the cache."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from quant.kernels import native


def decode_attention(
    q_BHC: Tensor,
    keys_BKLC: Tensor,
    values_BKLC: Tensor,
    lengths_B: Tensor,
    mask_B11L: Tensor | None,
) -> Tensor:
    """`softmax(q . keys / sqrt(C)) . values`, [B, H, C] in q's dtype, sums in float32.

    The H query heads share the K kv heads in order, H / K each; keys are read where they lie.

    Args:
        keys_BKLC, values_BKLC: views of the cache, the same strides.
        lengths_B: int64, positions in use of each sequence, 1 to L.
        mask_B11L: the same as something to add to the scores, or None where all of L is in use.
    """
    if native.can_attend(q_BHC, keys_BKLC):
        return native.attend(q_BHC, keys_BKLC, values_BKLC, lengths_B)
    q_BKGC = q_BHC.unflatten(1, (keys_BKLC.shape[1], -1))
    num_groups = q_BKGC.shape[2]
    if num_groups == 1 and q_BKGC.device.type == "cpu" and q_BKGC.itemsize == 2:
        # torch multiplies two rows of 16 bits in half the time of one.
        q_BKGC = q_BKGC.expand(-1, -1, 2, -1)
    out_BKGC = F.scaled_dot_product_attention(q_BKGC, keys_BKLC, values_BKLC, mask_B11L)
    return out_BKGC[:, :, :num_groups].flatten(1, 2)
