"""A tensor that lies in a file in chunks: which bytes a slice of it needs. Needs no torch.

Rows are counted along the first dimension. Chunks may end between rows, inside one, or inside an entry.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from parallel.placement import Index, Shape


@dataclass(frozen=True)
class Chunk:
    """A stretch of the file with consecutive bytes of one tensor."""

    offset: int
    num_bytes: int


@dataclass
class StoredTensor:
    """A tensor as it lies in the file: C order, little-endian, in chunks one after the other.

    Attributes:
        word: MindSpore's name of the dtype.
    """

    word: str
    dtype: str
    item_bytes: int
    shape: Shape
    chunks: list[Chunk]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


def byte_shape(stored: StoredTensor) -> tuple[int, ...]:
    """The shape with entries as a last dimension of bytes; a vector's entries are rows of one."""
    *rest, last = stored.shape if len(stored.shape) > 1 else (*(stored.shape or (1,)), 1)
    return (*rest, last * stored.item_bytes)


def byte_index(stored: StoredTensor, index: Index) -> Index:
    """An index into the tensor as one into `byte_shape`."""
    *rest, last = index if len(index) > 1 else (*(index or (slice(0, 1),)), slice(0, 1))
    return (*rest, slice(last.start * stored.item_bytes, last.stop * stored.item_bytes))


def row_runs(stored: StoredTensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) in runs: those that one chunk has whole, or one that several share."""
    row_bytes = math.prod(byte_shape(stored)[1:])
    ends = list(accumulate(chunk.num_bytes for chunk in stored.chunks))
    while start < stop:
        chunk_end = ends[bisect_right(ends, start * row_bytes)]
        run_stop = min(stop, max(chunk_end // row_bytes, start + 1))
        yield start, run_stop
        start = run_stop


def stretches(stored: StoredTensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Where the bytes [start, stop) of a tensor lie: offset in the file, and how many."""
    begin = 0
    for chunk in stored.chunks:
        first, last = max(start, begin), min(stop, begin + chunk.num_bytes)
        if first < last:
            yield chunk.offset + first - begin, last - first
        begin += chunk.num_bytes
