"""Integers as compressed-tensors packs them: int32 words, the first column in the lowest bits.

Four values of 8 bits or eight of 4 fill a word, each with half its range added (128 or 8), which
turns over its highest bit; the last word of a row is filled up with zeros. In the order of bytes that
safetensors has, the lowest first, a packed row is therefore that of quant/numeric.py, int8 or two
values of int4 a byte, with those bits turned over.

Shapes: N out_features, K in_features, B bytes of a row, W words of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TURNED_BITS = {8: 0x80, 4: 0x88}
_BYTES = 4


def num_words(num_columns: int, bits: int) -> int:
    """int32 words of a row."""
    return -(-num_columns * bits // 32)


def to_words(stored_NB: Tensor, num_columns: int, bits: int) -> Tensor:
    """int32 [N, W], from int8 [N, K], or uint8 [N, ceil(K / 2)] of int4."""
    turned_NB = stored_NB.view(torch.uint8) ^ _TURNED_BITS[bits]
    _clear_last(turned_NB, num_columns, bits)
    missing = _BYTES * num_words(num_columns, bits) - turned_NB.shape[1]
    return F.pad(turned_NB, (0, missing)).view(torch.int32)


def from_words(words_NW: Tensor, start: int, stop: int, bits: int, num_columns: int) -> Tensor:
    """The bytes [start, stop) of each row as they are stored here: int8, or uint8 of int4.

    Args:
        words_NW: the words that hold those bytes, from that of `start` on.
        num_columns: of the whole row: after an odd last one a half byte is empty.
    """
    first = start // _BYTES * _BYTES
    turned_NB = words_NW.view(torch.uint8)[:, start - first : stop - first] ^ _TURNED_BITS[bits]
    if stop * 8 // bits > num_columns:
        _clear_last(turned_NB, num_columns, bits)
    return turned_NB if bits == 4 else turned_NB.view(torch.int8)


def words_of(start: int, stop: int) -> slice:
    """The words that hold the bytes [start, stop) of a row."""
    return slice(start // _BYTES, -(-stop // _BYTES))


def _clear_last(row_NB: Tensor, num_columns: int, bits: int) -> None:
    """An odd number of int4 leaves the high half of the last byte empty: zeros."""
    if bits == 4 and num_columns % 2:
        row_NB[:, -1] &= 0x0F
