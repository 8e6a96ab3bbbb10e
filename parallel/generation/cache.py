"""The KV cache: allocated once, written and read by slot.

Row r of the cache belongs to one running sequence; its position p is slot `r * max_length + p`.
A step writes through a tensor of slots and masks by a tensor of lengths, so sequences join and
leave between steps without another step function.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.attention import write_slots


class KVCache:
    """Keys and values of every layer, for `num_rows` sequences of at most `max_length` tokens.

    Shapes: L layers, H local kv heads, R rows, M positions of a row, S slots (R * M), C head_dim. A
    head's positions lie one after the other, so that attention reads them as one run.
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
        shape = (num_layers, 2, num_heads, num_rows, max_length, head_dim)
        self._store_L2HRMC = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = tuple(_LayerViews.of(store) for store in self._store_L2HRMC)

    def write(self, layer: int, slots_T: Tensor, k_THC: Tensor, v_THC: Tensor) -> None:
        """Store one step's keys and values, [tokens, heads, head_dim], at their slots."""
        views = self._layers[layer]
        write_slots(k_THC, v_THC, slots_T, views.keys_HSC, views.values_HSC)

    def row(self, layer: int, row: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence's first `length` positions, views [heads, length, C]."""
        views = self._layers[layer]
        return views.keys_RHMC[row, :, :length], views.values_RHMC[row, :, :length]

    def rows(self, layer: int, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first rows, views [rows, heads, length, C]."""
        views = self._layers[layer]
        return views.keys_RHMC[:num_rows, :, :length], views.values_RHMC[:num_rows, :, :length]

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy a sequence to another row; the running ones stay the first rows that way."""
        view = self._store_L2HRMC
        view[:, :, :, target, :length] = view[:, :, :, source, :length]


@dataclass(frozen=True)
class _LayerViews:
    """Views of one layer's part of the store: by slot, for writing, and by row, for reading."""

    keys_HSC: Tensor
    values_HSC: Tensor
    keys_RHMC: Tensor
    values_RHMC: Tensor

    @staticmethod
    def of(store_2HRMC: Tensor) -> _LayerViews:
        slots, rows = store_2HRMC.flatten(2, 3), store_2HRMC.transpose(1, 2)
        return _LayerViews(slots[0], slots[1], rows[0], rows[1])
