"""Quantize and dequantize as pure functions.

The rule is symmetric round-to-nearest as in Golden Stick and compressed-tensors: with M the largest
absolute value of a channel, or of a group of its columns, `scale = 2 M / (2 ** bits - 1)` and
`q = clamp(round(w / scale))`, int8 within [-128, 127], int4 within [-8, 7]. It is computed in
float32 whatever the dtype of the weight, and from the *stored* scale, so that a scale kept in 16
bits multiplies back exactly what was divided by it.

Shapes: N out_features, K in_features, G groups of columns (1 for a whole row), S columns of a
group, B rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The integers of a weight.

    Attributes:
        bits: 8 or 4.
        group_size: columns that share a scale; None: a whole row does. A last group may be short.
    """

    bits: int = 8
    group_size: int | None = None

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def steps(self) -> int:
        """Steps between the lowest and the highest: what twice the largest value is divided by."""
        return 2**self.bits - 1

    def num_groups(self, in_features: int) -> int:
        return 1 if self.group_size is None else -(-in_features // self.group_size)


def dequantize(
    values_NK: Tensor,
    scale_NG: Tensor,
    dtype: torch.dtype,
    group_size: int | None = None,
    first_column: int = 0,
) -> Tensor:
    """`values * scale`, multiplied in float32, as `dtype`.

    Args:
        group_size: columns that share a scale; None: a whole row does.
        first_column: the place of the first column within its group, where these are a part of a
            row that begins inside one.
    """
    if group_size is None:
        return (values_NK.float() * scale_NG.float()).to(dtype)
    columns_K = torch.arange(values_NK.shape[1], device=values_NK.device) + first_column
    return (values_NK.float() * scale_NG.float()[:, columns_K // group_size]).to(dtype)


def dequantize_into(
    out_NK: Tensor, values_NK: Tensor, scale_NG: Tensor, group_size: int | None
) -> Tensor:
    """What `dequantize` gives, bit for bit, in memory that is there: float32 [N, K]."""
    out_NK.copy_(values_NK)
    if group_size is None:
        return out_NK.mul_(scale_NG.float())
    whole = out_NK.shape[1] // group_size
    grouped_NGS = out_NK[:, : whole * group_size].unflatten(1, (whole, group_size))
    grouped_NGS.mul_(scale_NG[:, :whole].float().unsqueeze(2))
    out_NK[:, whole * group_size :].mul_(scale_NG[:, -1:].float())
    return out_NK


def pack_int4(values_NK: Tensor) -> Tensor:
    """Values within [-8, 7] as nibbles, uint8 [N, ceil(K / 2)].

    An even column is the low nibble and the odd one after it the high nibble, in two's complement;
    a last column without a neighbour has a zero beside it.
    """
    is_odd = values_NK.shape[1] % 2
    even_NK = F.pad(values_NK, (0, 1)) if is_odd else values_NK
    # Two columns are one number of 16 bits, the even one its low byte: passes without gaps.
    pairs_NK = even_NK.flatten().view(torch.int16).view(len(even_NK), even_NK.shape[1] // 2)
    return ((pairs_NK & 0xF) | ((pairs_NK >> 4) & 0xF0)).to(torch.uint8)


def unpack_int4(packed: Tensor, num_columns: int) -> Tensor:
    """int8 [N, num_columns], as they were packed; each byte holds two columns."""
    assert packed.shape[1] == -(-num_columns // 2), (packed.shape, num_columns)
    values_NK = torch.empty(
        len(packed), 2 * packed.shape[1], dtype=torch.int8, device=packed.device
    )
    # Shifts of signed numbers keep the sign.
    values_NK[:, ::2] = (packed << 4).view(torch.int8) >> 4
    values_NK[:, 1::2] = packed.view(torch.int8) >> 4
    return values_NK[:, :num_columns]
