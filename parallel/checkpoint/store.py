"""A prepared checkpoint on disk: one directory of shards a rank, and a manifest.

    DIRECTORY/
      manifest.json               source, mesh, scheme; each tensor's shape, slices and sums
      config.json, tokenizer …    copied from the source
      rank_0/model.safetensors    the slices of rank 0, and so on

It is written under a temporary name, flushed to the disk, and renamed: a directory of the final
name is whole. Equal inputs give equal bytes: no time, host or absolute path is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.checkpoint.compressed_config import without_quantization
from parallel.checkpoint.layout import Layout
from parallel.checkpoint.planned_file import PlannedFile, PlannedTensor, tensor_bytes
from parallel.checkpoint.readers.prepared import FORMAT_VERSION, MANIFEST, SHARD_FILE
from parallel.checkpoint.shard import read_weight, source_name, weight_parts
from parallel.checkpoint.side_files import copy_files
from parallel.checkpoint.source import DTYPE_BYTES, Source
from parallel.checkpoint.whole_directory import renamed_when_whole
from parallel.model.config import override_config
from parallel.model.placements import Row
from parallel.placement import Index, index_shape


def write_prepared(
    layout: Layout,
    source: Source,
    size: int,
    output: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    num_threads: int = 1,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> None:
    """Write the shards of all ranks; every byte of the source is read once.

    Args:
        output: must not exist.
        overrides: values that stand in for those of config.json, also in the copy of it.
        num_threads: tensors that are worked on at a time; memory is bounded by that many.
        on_bytes: told the source bytes of each tensor when it is done.

    Raises:
        CheckpointError: `output` exists, the disk is full, or a weight cannot be quantized.
    """
    source = _SummedSource(source)
    with renamed_when_whole(output) as directory:
        copy_files(source.path, directory, lambda config: _own_config(config, overrides or {}))
        shards = [_ShardFile(layout, rank, size, directory) for rank in range(size)]
        sums: dict[str, Any] = {}

        def convert(row: Row) -> None:
            sums[row.name] = _write_row(layout, source, row, shards)
            on_bytes(source_bytes(source, row))

        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(convert, layout.table.values()))
        for shard in shards:
            shard.close()
        _write_manifest(directory, _manifest(layout, source, size, sums))


def source_bytes(source: Source, row: Row) -> int:
    """Size of a tensor in the source."""
    info = source.tensors[source_name(source, row)]
    return torch.Size(info.shape).numel() * DTYPE_BYTES[info.dtype]


def _write_row(layout: Layout, source: Source, row: Row, shards: list[_ShardFile]) -> Any:
    """Convert one whole tensor, lay each rank's slices down, and return the sums for the manifest."""
    whole = tuple(slice(0, length) for length in row.shape)
    weight = read_weight(layout, source, row, whole)
    sums = {}
    for name, tensor in weight_parts(row, weight).items():
        stored = shards[0].stored[name]
        slices = [stored.index(shard.rank, shard.size) for shard in shards]
        sums[name] = {
            "shape": list(stored.shape),
            "dtype": stored.dtype,
            "shards": [
                {"slice": _plain(index), "sha256": shard.put(name, tensor[index])}
                for shard, index in zip(shards, slices, strict=True)
            ],
        }
    return sums


class _SummedSource:
    """A source that takes the sum of each whole tensor as its bytes pass."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._sums: dict[str, str] = {}
        self.path = source.path
        self.tensors = source.tensors

    def read(self, name: str, index: Index) -> Tensor:
        tensor = self._source.read(name, index)
        if tuple(tensor.shape) == self.tensors[name].shape:
            self._sums[name] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        return tensor

    def identity(self) -> dict[str, Any]:
        """The source's own, with the sums unless it brings some from where it was prepared."""
        return {"tensors": dict(sorted(self._sums.items())), **self._source.identity()}


class _ShardFile(PlannedFile):
    """One rank's safetensors file."""

    def __init__(self, layout: Layout, rank: int, size: int, directory: Path) -> None:
        self.rank, self.size = rank, size
        self.stored = {tensor.name: tensor for tensor in layout.tensors}
        folder = directory / f"rank_{rank}"
        folder.mkdir()
        entries = [
            PlannedTensor(item.name, index_shape(item.index(rank, size)), item.dtype)
            for item in layout.tensors
        ]
        # Ranks often have shards of equal shapes; the metadata tells one that was swapped.
        super().__init__(folder / SHARD_FILE, entries, {"rank": str(rank), "tp": str(size)})

    def put(self, name: str, tensor: Tensor) -> str:
        """Put a tensor at its place; returns the sha256 of its bytes."""
        return hashlib.sha256(self.write(name, tensor)).hexdigest()


def _own_config(config: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of the scheme is not said twice, in another's words."""
    return override_config(without_quantization(config), overrides)


def _manifest(layout: Layout, source: Source, size: int, sums: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: part for row in layout.table for name, part in sums[row].items()}
    return {
        "format": "shardrun",
        "version": FORMAT_VERSION,
        "complete": True,
        "mesh": {"tp": size},
        "vocab_emb_dp": layout.vocab_emb_dp,
        "scheme": layout.scheme.to_dict(),
        "source": source.identity(),
        "tensors": tensors,
    }


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest, indent=1)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _plain(index: Index) -> list[list[int]]:
    return [[cut.start, cut.stop] for cut in index]
