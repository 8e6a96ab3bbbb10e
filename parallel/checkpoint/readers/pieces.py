"""A tensor that lies in pieces: each a block of a tensor of some file. Needs no torch to describe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallel.checkpoint.source import TensorFile, TensorInfo
from parallel.errors import CheckpointError
from parallel.placement import Index, Shape, index_shape, intersection, relative

if TYPE_CHECKING:
    from torch import Tensor

# What is larger is compared with its copies at its ends only: each byte is read once.
_MOST_COMPARED = 1 << 16


@dataclass(frozen=True)
class Piece:
    """A block of a global tensor.

    Attributes:
        file: where it is.
        name: the tensor of that file that holds it.
        origin: the entry of that tensor at which the block begins.
        place: the slice of the global tensor that it is.
        copies: other files whose tensor of that name holds the same; reading compares them.
    """

    file: TensorFile
    name: str
    origin: Shape
    place: Index
    copies: tuple[TensorFile, ...] = ()

    def read(self, index: Index) -> Tensor:
        """What it has of a slice of the global tensor that lies in it.

        Raises:
            CheckpointError: a copy differs: all of a slice up to 64 KiB, the first and the last row of
                a larger one.
        """
        found = self.file.read(self.name, self._stored(index))
        for copy in self.copies:
            self._compare(copy, found, index)
        return found

    def _stored(self, index: Index) -> Index:
        """A slice of the global tensor, counted from the beginning of the file's."""
        moves = [start - cut.start for start, cut in zip(self.origin, self.place, strict=True)]
        return tuple(
            slice(cut.start + move, cut.stop + move) for cut, move in zip(index, moves, strict=True)
        )

    def _compare(self, copy: TensorFile, found: Tensor, index: Index) -> None:
        for part in _compared(found, index):
            here = found[relative(part, index)]
            if not _same_bytes(here, copy.read(self.name, self._stored(part))):
                raise CheckpointError(
                    f"{self.file.path} and {copy.path} must hold the same {self.name}, but do not; "
                    "copy all ranks' files of one checkpoint again."
                )


class PiecedTensor:
    """A global tensor and the pieces that cover it, each entry once.

    Attributes:
        info: shape and dtype of the whole; all pieces are of that dtype.
    """

    def __init__(self, info: TensorInfo, pieces: Sequence[Piece]) -> None:
        covered = sum(math.prod(index_shape(piece.place)) for piece in pieces)
        assert covered == math.prod(info.shape), (info, pieces)
        self.info = info
        self.pieces = tuple(pieces)

    def read(self, index: Index) -> Tensor:
        """A slice of the whole: what its one piece gives, perhaps a view, or joined from several."""
        import torch

        parts = list(self._parts(index))
        if len(parts) == 1:
            return parts[0][0].read(index)
        joined = torch.empty(index_shape(index), dtype=getattr(torch, self.info.dtype))
        for piece, common in parts:
            joined[relative(common, index)] = piece.read(common)
        return joined

    def _parts(self, index: Index) -> Iterator[tuple[Piece, Index]]:
        """The pieces that a slice needs, and what it needs of each."""
        for piece in self.pieces:
            common = intersection(piece.place, index)
            if common is not None:
                yield piece, common


def _compared(found: Tensor, index: Index) -> list[Index]:
    """The parts of a slice that are compared: all of a small one, or its first and its last row."""
    if found.nbytes <= _MOST_COMPARED:
        return [index]
    rows = index[0]
    ends = (slice(rows.start, rows.start + 1), slice(rows.stop - 1, rows.stop))
    return [(end, *index[1:]) for end in ends]


def _same_bytes(first: Tensor, second: Tensor) -> bool:
    """Equal bits, whatever they mean: a NaN is equal to itself."""
    import torch

    pair = [item.reshape(-1).contiguous().view(torch.uint8) for item in (first, second)]
    return torch.equal(*pair)
