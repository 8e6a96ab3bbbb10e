"""Where each part of a tensor lives: which slice of it belongs to a rank.

A placement speaks of shapes and indices only. `index` says which slice of the global tensor is a
rank's; the reader of a checkpoint, the writer of shards and the byte counts of the plan all ask it.

Sizes that do not divide need no padding: the units of a Split are dealt out evenly, so that two
ranks differ by one unit at most, and every collective of the model works on the hidden dimension
or pads in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

Index = tuple[slice, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Replicate:
    """Every rank holds the whole tensor."""

    def index(self, shape: Shape, rank: int, size: int) -> Index:
        return tuple(slice(0, length) for length in shape)

    def __str__(self) -> str:
        return "replicate"


@dataclass(frozen=True)
class Split:
    """Rank r holds the r-th run of units along one dimension.

    Args:
        dim: the dimension that is cut.
        unit: how many entries stay together: a head's rows, a quantization group.
    """

    dim: int
    unit: int = 1

    def index(self, shape: Shape, rank: int, size: int) -> Index:
        num_units = self.num_units(shape)
        start, stop = (num_units * r // size * self.unit for r in (rank, rank + 1))
        return _cut(shape, self.dim, start, stop)

    def num_units(self, shape: Shape) -> int:
        """As many ranks, at most, hold something."""
        return -(-shape[self.dim] // self.unit)

    def __str__(self) -> str:
        return f"split(dim={self.dim})"


@dataclass(frozen=True)
class SplitKVHeads:
    """Key and value heads: dealt out to the ranks, or, where there are fewer heads than ranks,
    each head replicated on `size / num_heads` neighbouring ranks.

    Args:
        dim: the dimension that is cut.
        num_heads: number of kv heads; it divides `size` or `size` divides it.
    """

    dim: int
    num_heads: int

    def index(self, shape: Shape, rank: int, size: int) -> Index:
        head_dim = shape[self.dim] // self.num_heads
        if size <= self.num_heads:
            return Split(self.dim, head_dim).index(shape, rank, size)
        head = rank * self.num_heads // size
        return _cut(shape, self.dim, head * head_dim, (head + 1) * head_dim)

    def __str__(self) -> str:
        return f"split kv heads(dim={self.dim})"


Placement = Replicate | Split | SplitKVHeads


def index_shape(index: Index) -> Shape:
    """The shape of the slice that `index` takes."""
    return tuple(item.stop - item.start for item in index)


def intersection(first: Index, second: Index) -> Index | None:
    """The entries that two slices share; None where there are none."""
    common = tuple(
        slice(max(a.start, b.start), min(a.stop, b.stop))
        for a, b in zip(first, second, strict=True)
    )
    return None if any(cut.start >= cut.stop for cut in common) else common


def relative(inner: Index, outer: Index) -> Index:
    """A slice of the global tensor, counted from the beginning of one that contains it."""
    return tuple(
        slice(cut.start - base.start, cut.stop - base.start)
        for cut, base in zip(inner, outer, strict=True)
    )


def _cut(shape: Shape, dim: int, start: int, stop: int) -> Index:
    """All of `shape`, but [start, stop) along `dim`; a last unit may be short."""
    whole = [slice(0, length) for length in shape]
    whole[dim] = slice(min(start, shape[dim]), min(stop, shape[dim]))
    return tuple(whole)
