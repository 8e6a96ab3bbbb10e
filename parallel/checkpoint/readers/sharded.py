"""Shards of `prepare` as a source: any slice of any tensor, whatever size they were cut for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.readers.safetensors_file import SafetensorsFile
from parallel.checkpoint.source import TensorInfo
from parallel.errors import CheckpointError
from parallel.placement import Index, index_shape, intersection, relative
from quant.scheme import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Shard:
    rank: int
    index: Index


class ShardedSource(ABC):
    """The shards of some ranks, or of all.

    Args:
        slices: of each tensor, those of each of `size` ranks.

    Attributes:
        size: the tensor-parallel size it was cut for; any slice can be read all the same.
        ranks: whose shards are there.
        scheme: how its weights are quantized.
        vocab_emb_dp: whether every rank has the whole embedding.
    """

    def __init__(
        self,
        path: Path,
        *,
        size: int,
        scheme: QuantScheme,
        vocab_emb_dp: bool,
        tensors: Mapping[str, TensorInfo],
        slices: Mapping[str, Sequence[Index]],
        files: Mapping[int, SafetensorsFile],
    ) -> None:
        self.path = path
        self.size, self.ranks = size, tuple(files)
        self.scheme, self.vocab_emb_dp = scheme, vocab_emb_dp
        self.tensors = tensors
        self._slices, self._files = slices, files
        self._shards = {
            name: [_Shard(rank, cuts[rank]) for rank in self.ranks] for name, cuts in slices.items()
        }

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of a global tensor: from one rank's file where it is whole there, else joined.

        Raises:
            CheckpointError: a part of it is in no shard that is here.
        """
        for shard in self._shards[name]:
            if _contains(shard.index, index):
                return self._read_shard(name, shard, index)
        return self._join(name, index)

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells the checkpoint that they were made from."""

    def slices(self, name: str) -> list[Index]:
        """The slice of a tensor that each of `size` ranks has, here or elsewhere."""
        return list(self._slices[name])

    def file(self, rank: int) -> SafetensorsFile:
        """The shard file of a rank that is here."""
        return self._files[rank]

    def shard_tensors(self, rank: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each tensor that the file of a rank must hold."""
        return {
            name: (index_shape(cuts[rank]), self.tensors[name].dtype)
            for name, cuts in self._slices.items()
        }

    @property
    def _has_gaps(self) -> bool:
        return len(self.ranks) < self.size

    def _read_shard(self, name: str, shard: _Shard, index: Index) -> Tensor:
        return self._files[shard.rank].read(name, relative(index, shard.index))

    def _join(self, name: str, index: Index) -> Tensor:
        import torch

        info = self.tensors[name]
        joined = torch.empty(index_shape(index), dtype=getattr(torch, info.dtype))
        found = torch.zeros(joined.shape, dtype=torch.bool) if self._has_gaps else None
        # Ranks that share a kv head have the same slice.
        for shard in {str(shard.index): shard for shard in self._shards[name]}.values():
            common = intersection(shard.index, index)
            if common is not None:
                target = relative(common, index)
                joined[target] = self._read_shard(name, shard, common)
                if found is not None:
                    found[target] = True
        if found is not None and not found.all():
            raise CheckpointError(
                f"{self.path} has the shards of ranks {', '.join(map(str, self.ranks))} of "
                f"{self.size} only, and a part of {name} is in none of them; prepare it again with "
                "prepare.ranks of the ranks that run here."
            )
        return joined


def _contains(outer: Index, inner: Index) -> bool:
    return all(a.start <= b.start and b.stop <= a.stop for a, b in zip(outer, inner, strict=True))
