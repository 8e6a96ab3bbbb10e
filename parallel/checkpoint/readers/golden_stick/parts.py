"""What Golden Stick's files hold, as the parts of each linear and KV cache. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallel.checkpoint.readers.pieces import PiecedTensor
from parallel.checkpoint.source import TensorInfo
from parallel.placement import Index, Shape
from quant.scheme import LinearScheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StoredPart:
    """One part over all ranks.

    Attributes:
        stored: its name in the files.
        by_rank: what each rank has of it, where all have the whole; else nothing.
    """

    stored: str
    tensor: PiecedTensor
    by_rank: tuple[PiecedTensor, ...] = ()

    @property
    def info(self) -> TensorInfo:
        return self.tensor.info

    def whole(self) -> Tensor:
        return self.tensor.read(whole_index(self.info.shape))

    def replicas(self) -> Iterator[Tensor]:
        """What each rank has, where all have the whole."""
        return (tensor.read(whole_index(self.info.shape)) for tensor in self.by_rank)


@dataclass(frozen=True)
class LinearParts:
    """A quantized linear.

    Attributes:
        module: Hugging Face's name of it.
        shape: of its weight.
        is_row_parallel: whether ranks cut its input channels.
        parts: by kind.
    """

    module: str
    scheme: LinearScheme
    shape: Shape
    is_row_parallel: bool
    parts: Mapping[str, StoredPart]

    @property
    def num_groups(self) -> int:
        """Scales of each row."""
        return self.shape[1] // (self.scheme.group_size or self.shape[1])

    def __contains__(self, kind: str) -> bool:
        return kind in self.parts

    def __getitem__(self, kind: str) -> StoredPart:
        return self.parts[kind]

    def read(self, kind: str, index: Index) -> Tensor:
        return self.parts[kind].tensor.read(index)


# The parts of one layer's KV cache by kind.
CacheParts = Mapping[str, StoredPart]


@dataclass(frozen=True)
class Parts:
    """All that the files hold.

    Attributes:
        floats: what is not quantized, by Hugging Face's names.
        linears: by module.
        caches: of each layer, by the attention's module.
    """

    floats: Mapping[str, PiecedTensor]
    linears: Mapping[str, LinearParts]
    caches: Mapping[str, CacheParts]


def whole_index(shape: Shape) -> Index:
    return tuple(slice(0, length) for length in shape)
