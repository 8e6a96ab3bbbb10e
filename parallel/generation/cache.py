"""The KV cache: allocated once, written and read by slot.

Row r of the cache belongs to one running sequence; its position p is slot `r * max_length + p`.
A step writes through a tensor of slots and masks by a tensor of lengths, so sequences join and
leave between steps without another step function.

Shapes: L layers, H local kv heads, R rows, M positions of a row, S slots (R * M), C head_dim, T tokens
of a step, B sequences of a decode step. A head's positions lie one after the other, so that attention
reads them as one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quant.attention import (
    decode_attention,
    int8_decode_attention,
    write_int8_slots,
    write_slots,
)
from quant.kv import Int8Store

# Static scales of one layer's keys and values, float32 [H, C] each.
StaticScales = tuple[Tensor, Tensor]
Mask = Callable[[], Tensor | None]


class KVCache:
    """Keys and values of every layer, for `num_rows` sequences of at most `max_length` tokens.

    Args:
        dtype: the compute dtype, and that of the keys and values unless they are int8.
        granularity: of an int8 cache, per_token or per_channel; None: floats.
        scales: of each layer, with per_channel.
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
        *,
        granularity: str | None = None,
        scales: Sequence[StaticScales] = (),
    ) -> None:
        assert (granularity == "per_channel") == bool(scales), granularity
        self.num_rows = num_rows
        self.max_length = max_length
        shape = (num_layers, 2, num_heads, num_rows, max_length)
        kind = torch.int8 if granularity else dtype
        store_L2HRMC = torch.zeros(*shape, head_dim, dtype=kind, device=device)
        self._stores: list[Tensor] = [store_L2HRMC]  # [L, 2, H, R, M, …]
        self._layers: Sequence[_Layer]
        if granularity is None:
            self._layers = [_FloatLayer.of(store) for store in store_L2HRMC]
        elif granularity == "per_channel":
            self._layers = [
                _Int8Layer.of_channels(store, pair, dtype)
                for store, pair in zip(store_L2HRMC, scales, strict=True)
            ]
        else:
            scale_L2HRM = torch.zeros(shape, device=device)
            self._stores.append(scale_L2HRM)
            self._layers = [
                _Int8Layer.of_tokens(store, scale, dtype)
                for store, scale in zip(store_L2HRMC, scale_L2HRM, strict=True)
            ]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and the scales of tokens; static scales are weights."""
        return sum(store.nbytes for store in self._stores)

    def write(self, layer: int, slots_T: Tensor, k_THC: Tensor, v_THC: Tensor) -> None:
        """Store one step's keys and values, [tokens, heads, head_dim], at their slots."""
        self._layers[layer].write(slots_T, k_THC, v_THC)

    def row(self, layer: int, row: int, length: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence's positions from `first` to `length`, [heads, positions, C]
        in the compute dtype: views, or what the integers stand for, those of this step included."""
        return self._layers[layer].row(row, slice(first, length))

    def attend(
        self,
        layer: int,
        q_BHC: Tensor,
        positions_B: Tensor,
        length: int,
        mask: Mask,
        window: int | None = None,
    ) -> Tensor:
        """Decode attention of the first rows' next tokens over their first `length` positions, or
        the last `window` of those that each sees."""
        return self._layers[layer].attend(q_BHC, positions_B, length, mask, window)

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy a sequence to another row; the running ones stay the first rows that way."""
        for store in self._stores:
            store[:, :, :, target, :length] = store[:, :, :, source, :length]


class _Layer(Protocol):
    """One layer's part of the cache; the methods are those of KVCache."""

    def write(self, slots_T: Tensor, k_THC: Tensor, v_THC: Tensor) -> None: ...

    def row(self, row: int, positions: slice) -> tuple[Tensor, Tensor]: ...

    def attend(
        self, q_BHC: Tensor, positions_B: Tensor, length: int, mask: Mask, window: int | None
    ) -> Tensor: ...


@dataclass(frozen=True)
class _FloatLayer:
    """Views of one layer's part of the store: by slot, for writing, and by row, for reading."""

    keys_HSC: Tensor
    values_HSC: Tensor
    keys_RHMC: Tensor
    values_RHMC: Tensor

    @staticmethod
    def of(store_2HRMC: Tensor) -> _FloatLayer:
        return _FloatLayer(*_by_slot(store_2HRMC), *_by_row(store_2HRMC))

    def write(self, slots_T: Tensor, k_THC: Tensor, v_THC: Tensor) -> None:
        write_slots(k_THC, v_THC, slots_T, self.keys_HSC, self.values_HSC)

    def row(self, row: int, positions: slice) -> tuple[Tensor, Tensor]:
        return self.keys_RHMC[row, :, positions], self.values_RHMC[row, :, positions]

    def attend(
        self, q_BHC: Tensor, positions_B: Tensor, length: int, mask: Mask, window: int | None
    ) -> Tensor:
        keys, values = (x[: len(q_BHC), :, :length] for x in (self.keys_RHMC, self.values_RHMC))
        return decode_attention(q_BHC, keys, values, positions_B, mask, window)


@dataclass(frozen=True)
class _Int8Layer:
    """The same of integers; prefill is given what they stand for, in the compute dtype.

    So every position that is attended to went through the integers, also those of the step itself:
    text depends on no chunk, and decode sees what prefill saw.
    """

    slots: Int8Store
    rows: Int8Store
    dtype: torch.dtype

    @staticmethod
    def of_tokens(store_2HRMC: Tensor, scale_2HRM: Tensor, dtype: torch.dtype) -> _Int8Layer:
        slots, rows = (
            Int8Store(*view(store_2HRMC), *view(scale_2HRM), False) for view in (_by_slot, _by_row)
        )
        return _Int8Layer(slots, rows, dtype)

    @staticmethod
    def of_channels(store_2HRMC: Tensor, scales: StaticScales, dtype: torch.dtype) -> _Int8Layer:
        slots, rows = (Int8Store(*view(store_2HRMC), *scales, True) for view in (_by_slot, _by_row))
        return _Int8Layer(slots, rows, dtype)

    def write(self, slots_T: Tensor, k_THC: Tensor, v_THC: Tensor) -> None:
        write_int8_slots(k_THC, v_THC, slots_T, self.slots)

    def row(self, row: int, positions: slice) -> tuple[Tensor, Tensor]:
        return self.rows.part((row, slice(None), positions)).dequantize(self.dtype)

    def attend(
        self, q_BHC: Tensor, positions_B: Tensor, length: int, mask: Mask, window: int | None
    ) -> Tensor:
        held = self.rows.part((slice(len(q_BHC)), slice(None), slice(length)))
        return int8_decode_attention(q_BHC, held, positions_B, mask, window)


def _by_slot(store_2HRM: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, [H, S, …] each."""
    slots = store_2HRM.flatten(2, 3)
    return slots[0], slots[1]


def _by_row(store_2HRM: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, [R, H, M, …] each."""
    rows = store_2HRM.transpose(1, 2)
    return rows[0], rows[1]
