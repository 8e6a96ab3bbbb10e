"""The KV cache: allocated once, written and read by slot.

Row r of the cache belongs to one running sequence; its position p is slot `r * max_length + p`.
A step writes through a tensor of slots and masks by a tensor of lengths, so sequences join and
leave between steps without another step function.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, for `num_rows` sequences of at most `max_length` tokens.

    Shapes: L layers, H local kv heads, S slots (num_rows * max_length), C head_dim.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        num_rows: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_rows = num_rows
        self.max_length = max_length
        shape = (num_layers, 2, num_heads, num_rows * max_length, head_dim)
        self._store_L2HSC = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, layer: int, slots_T: Tensor, k_THC: Tensor, v_THC: Tensor) -> None:
        """Store one step's keys and values, [tokens, heads, head_dim], at their slots."""
        keys_HSC, values_HSC = self._store_L2HSC[layer]
        keys_HSC.index_copy_(1, slots_T, k_THC.transpose(0, 1))
        values_HSC.index_copy_(1, slots_T, v_THC.transpose(0, 1))

    def row(self, layer: int, row: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence's first `length` positions, views [heads, length, C]."""
        start = row * self.max_length
        keys_HSC, values_HSC = self._store_L2HSC[layer, :, :, start : start + length]
        return keys_HSC, values_HSC

    def rows(self, layer: int, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first rows, views [rows, heads, length, C]."""
        store = self._store_L2HSC[layer].unflatten(2, (self.num_rows, self.max_length))
        keys_HRSC, values_HRSC = store[:, :, :num_rows, :length]
        return keys_HRSC.transpose(0, 1), values_HRSC.transpose(0, 1)

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy a sequence to another row; the running ones stay the first rows that way."""
        view = self._store_L2HSC.unflatten(3, (self.num_rows, self.max_length))
        view[:, :, :, target, :length] = view[:, :, :, source, :length]
