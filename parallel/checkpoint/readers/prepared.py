"""Our own prepared directory as a source: any slice of any tensor, whatever size it was cut for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.json_file import distinct, read_json_object
from parallel.checkpoint.readers.safetensors_file import SafetensorsFile
from parallel.checkpoint.source import DTYPE_BYTES, TensorInfo
from parallel.errors import CheckpointError
from parallel.placement import Index, index_shape, intersection, relative
from quant.errors import QuantError
from quant.scheme import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
SHARD_FILE = "model.safetensors"
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class _Shard:
    rank: int
    index: Index


class PreparedSource:
    """A directory that `prepare` wrote.

    Attributes:
        size: the tensor-parallel size it was cut for; any slice can be read all the same.
        ranks: whose shards are there; all, unless `prepare.ranks` named some.
        scheme: how its weights are quantized.
        vocab_emb_dp: whether every rank has the whole embedding.

    Raises:
        CheckpointError: no whole manifest, a missing shard, or a shard whose rank, names, shapes,
            dtypes or size are not the manifest's. That the slices are the model's is for
            parallel/checkpoint/open.py, which knows its table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = _read_manifest(path / MANIFEST)
        self.size: int = self.manifest["mesh"]["tp"]
        self.ranks: tuple[int, ...] = tuple(self.manifest["ranks"])
        self.scheme = QuantScheme.from_dict(self.manifest["scheme"])
        self.vocab_emb_dp: bool = self.manifest["vocab_emb_dp"]
        self._slices = {name: _slices(entry) for name, entry in self._entries()}
        self._shards = {
            name: [_Shard(rank, slices[rank]) for rank in self.ranks]
            for name, slices in self._slices.items()
        }
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(entry["shape"]), entry["dtype"], MANIFEST)
            for name, entry in self._entries()
        }
        self._files = {
            rank: SafetensorsFile(path / f"rank_{rank}" / SHARD_FILE) for rank in self.ranks
        }
        for rank in self.ranks:
            self._check_file(rank)

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of a global tensor: from one rank's file where it is whole there, else joined.

        Raises:
            CheckpointError: a part of it is in no shard that is here.
        """
        for shard in self._shards[name]:
            if _contains(shard.index, index):
                return self._read_shard(name, shard, index)
        return self._join(name, index)

    def identity(self) -> dict[str, Any]:
        """That of the checkpoint it was prepared from."""
        return dict(self.manifest["source"])

    def slices(self, name: str) -> list[Index]:
        """The slice of a tensor that each of `size` ranks has, here or elsewhere."""
        return self._slices[name]

    def file(self, rank: int) -> SafetensorsFile:
        """The shard file of a rank that is here."""
        return self._files[rank]

    def sha256(self, name: str, rank: int) -> str:
        """The sum of a rank's slice of a tensor, by the manifest."""
        return str(self.manifest["tensors"][name]["shards"][rank]["sha256"])

    @property
    def _has_gaps(self) -> bool:
        return len(self.ranks) < self.size

    def _entries(self) -> list[tuple[str, dict[str, Any]]]:
        return list(self.manifest["tensors"].items())

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

    def _check_file(self, rank: int) -> None:
        found = self._files[rank].tensors
        wanted = {
            name: (index_shape(slices[rank]), self.tensors[name].dtype)
            for name, slices in self._slices.items()
        }
        if {name: (info.shape, info.dtype) for name, info in found.items()} != wanted:
            raise CheckpointError(
                f"{self._files[rank].path} does not hold the tensors that {MANIFEST} lists; "
                "prepare the checkpoint again."
            )
        written_for = self._files[rank].metadata
        if written_for.get("rank") != str(rank) or written_for.get("tp") != str(self.size):
            raise CheckpointError(
                f"{self._files[rank].path} was not written for rank {rank} of {self.size}, but for "
                f"{written_for.get('rank')} of {written_for.get('tp')}; prepare the checkpoint again."
            )


def is_prepared(path: Path) -> bool:
    """Whether a directory was written by `prepare`."""
    return (path / MANIFEST).exists()


def prepared_size(path: Path) -> int | None:
    """The tensor-parallel size of a directory that `prepare` wrote, by its manifest alone; None: it is
    another. Raises CheckpointError for a manifest that is damaged."""
    return int(_read_manifest(path / MANIFEST)["mesh"]["tp"]) if is_prepared(path) else None


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json_object(path, hook=distinct)
    version = manifest.get("version")
    if manifest.get("format") != "shardrun" or (type(version), version) != (int, FORMAT_VERSION):
        raise CheckpointError(
            f"{path} is not a manifest of version {FORMAT_VERSION}; prepare the checkpoint again."
        )
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, QuantError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); prepare again.") from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Every value that is read later has its type, and every tensor a slice for each rank, and a sum
    for those that are here."""
    size = manifest["mesh"]["tp"]
    if manifest["complete"] is not True or type(size) is not int or size < 1:
        raise ValueError(f"complete is {manifest['complete']!r}, tp is {size!r}")
    if len(manifest["mesh"]) != 1:
        raise ValueError(f"the mesh is {manifest['mesh']!r}, of which only tp is known")
    ranks = manifest["ranks"]
    if not ranks or not all(type(rank) is int and 0 <= rank < size for rank in ranks):
        raise ValueError(f"ranks is {ranks!r}, tp is {size}")
    if len(set(ranks)) < len(ranks):
        raise ValueError(f"ranks is {ranks!r}, of which one stands twice")
    if type(manifest["vocab_emb_dp"]) is not bool or type(manifest["source"]) is not dict:
        raise ValueError("vocab_emb_dp or source is of another type")
    if not manifest["tensors"]:
        raise ValueError("it lists no tensors")
    QuantScheme.from_dict(manifest["scheme"])
    for name, entry in manifest["tensors"].items():
        lengths = [*entry["shape"], *(end for shard in entry["shards"] for end in _ends(shard))]
        if not all(type(length) is int and length >= 0 for length in lengths):
            raise ValueError(f"{name} has a length that is no whole number")
        if len(entry["shards"]) != size or entry["dtype"] not in DTYPE_BYTES:
            raise ValueError(f"{name} has {len(entry['shards'])} shards of {entry['dtype']!r}")
        if not all(_SHA256.fullmatch(entry["shards"][rank]["sha256"]) for rank in ranks):
            raise ValueError(f"{name} has a sum that is none")


def _ends(shard: dict[str, Any]) -> Iterator[int]:
    return (end for start, stop in shard["slice"] for end in (start, stop))


def _slices(entry: dict[str, Any]) -> list[Index]:
    return [
        tuple(slice(start, stop) for start, stop in shard["slice"]) for shard in entry["shards"]
    ]


def _contains(outer: Index, inner: Index) -> bool:
    return all(a.start <= b.start and b.stop <= a.stop for a, b in zip(outer, inner, strict=True))
