"""Our own prepared directory as a source: shards, and the manifest that lists them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parallel.checkpoint.json_file import distinct, read_json_object
from parallel.checkpoint.readers.safetensors_file import SafetensorsFile
from parallel.checkpoint.readers.shard_header import FORMAT_VERSION
from parallel.checkpoint.readers.sharded import ShardedSource
from parallel.checkpoint.source import DTYPE_BYTES, TensorInfo
from parallel.errors import CheckpointError
from parallel.placement import Index
from quant.errors import QuantError
from quant.scheme import QuantScheme

MANIFEST = "manifest.json"
SHARD_FILE = "model.safetensors"
_SHA256 = re.compile("[0-9a-f]{64}")


class PreparedSource(ShardedSource):
    """A directory that `prepare` wrote, of which `prepare.ranks` may have named some ranks alone.

    Raises:
        CheckpointError: no whole manifest, a missing shard, or a shard whose rank, names, shapes,
            dtypes or size are not the manifest's. That the slices are the model's is for
            parallel/checkpoint/open.py, which knows its table.
    """

    def __init__(self, path: Path) -> None:
        self.manifest = _read_manifest(path / MANIFEST)
        entries: dict[str, dict[str, Any]] = self.manifest["tensors"]
        super().__init__(
            path,
            size=self.manifest["mesh"]["tp"],
            scheme=QuantScheme.from_dict(self.manifest["scheme"]),
            vocab_emb_dp=self.manifest["vocab_emb_dp"],
            tensors={
                name: TensorInfo(tuple(entry["shape"]), entry["dtype"], MANIFEST)
                for name, entry in entries.items()
            },
            slices={name: _slices(entry) for name, entry in entries.items()},
            files={
                rank: SafetensorsFile(path / f"rank_{rank}" / SHARD_FILE)
                for rank in self.manifest["ranks"]
            },
        )
        for rank in self.ranks:
            self._check_file(rank)

    def identity(self) -> dict[str, Any]:
        """That of the checkpoint it was prepared from."""
        return dict(self.manifest["source"])

    def sha256(self, name: str, rank: int) -> str:
        """The sum of a rank's slice of a tensor, by the manifest."""
        return str(self.manifest["tensors"][name]["shards"][rank]["sha256"])

    def _check_file(self, rank: int) -> None:
        file = self.file(rank)
        found = {name: (info.shape, info.dtype) for name, info in file.tensors.items()}
        if found != self.shard_tensors(rank):
            raise CheckpointError(
                f"{file.path} does not hold the tensors that {MANIFEST} lists; "
                "prepare the checkpoint again."
            )
        written_for = file.metadata
        if written_for.get("rank") != str(rank) or written_for.get("tp") != str(self.size):
            raise CheckpointError(
                f"{file.path} was not written for rank {rank} of {self.size}, but for "
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
