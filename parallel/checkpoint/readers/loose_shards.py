"""Shards of `prepare` that were copied away from their manifest, under whatever names.

    DIRECTORY/llama2_13b_rtn_a16w8.ckpt     rank_0/model.safetensors of a tp of 1
    DIRECTORY/rank_0/x.ckpt, rank_1/x.ckpt  those of a tp of 2

Their headers say rank, size and scheme; the model's shape is the directory's config, or YAML, and what
they hold must be what `prepare` cuts of it. There are no sums. Needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.checkpoint.layout import SCALE_SUFFIX, Layout, input_zero_point_name, make_layout
from parallel.checkpoint.readers.mindformers.strategy import is_strategy
from parallel.checkpoint.readers.safetensors_file import SafetensorsFile
from parallel.checkpoint.readers.shard_header import ShardHeader, is_shard
from parallel.checkpoint.readers.sharded import ShardedSource
from parallel.checkpoint.source import TensorInfo
from parallel.errors import CheckpointError
from parallel.model.config import ModelConfig
from parallel.model.placements import Row

_PATTERNS = ("*.ckpt", "*.safetensors", "rank_*/*.ckpt", "rank_*/*.safetensors")


class LooseShards(ShardedSource):
    """All shards of a model, without a manifest.

    Args:
        files: what `find_shards` found in `path`.

    Raises:
        CheckpointError: a file that cannot be read, shards that are not one model's or not all of it, or
            not of this model's shape.
    """

    def __init__(self, path: Path, files: Sequence[Path], config: ModelConfig) -> None:
        headers = _read_headers(path, files)
        first, header = next(iter(headers.items()))
        layout = _layout(config, header, first)
        layout.check_tp(header.size)
        super().__init__(
            path,
            size=header.size,
            scheme=header.scheme,
            vocab_emb_dp=header.vocab_emb_dp,
            tensors={
                stored.name: TensorInfo(stored.shape, stored.dtype, first.path.name)
                for stored in layout.tensors
            },
            slices={
                stored.name: [stored.index(rank, header.size) for rank in range(header.size)]
                for stored in layout.tensors
            },
            files={said.rank: file for file, said in headers.items()},
        )
        for rank in self.ranks:
            self._check_file(rank)

    def identity(self) -> dict[str, Any]:
        """All files, by their paths below the directory."""
        files = (self.file(rank) for rank in self.ranks)
        return {
            "files": {
                file.path.relative_to(self.path).as_posix(): file.identity() for file in files
            }
        }

    def _check_file(self, rank: int) -> None:
        file = self.file(rank)
        found = {name: (info.shape, info.dtype) for name, info in file.tensors.items()}
        wanted = self.shard_tensors(rank)
        for name in sorted({*wanted, *found}):
            if wanted.get(name) != found.get(name):
                raise CheckpointError(
                    f"{file.path} is a shard of another model: {name} is "
                    f"{_said(found.get(name), 'missing')}, but the config asks for "
                    f"{_said(wanted.get(name), 'no such tensor')}; use the config.json or YAML that it "
                    "was prepared with."
                )


def find_shards(path: Path) -> list[Path]:
    """The shards in a directory, or in those of its ranks; none where no file there is one.

    Raises:
        CheckpointError: other weights lie beside them.
    """
    # A link to a file beside it is another name of that.
    files = {
        os.path.realpath(file): file
        for pattern in _PATTERNS
        for file in sorted(path.glob(pattern))
        if not is_strategy(file)
    }
    shards = [file for file in files.values() if is_shard(file)]
    others = [file for file in files.values() if file not in shards]
    if shards and others:
        raise CheckpointError(
            f"{path} must hold one checkpoint, but {shards[0].relative_to(path)} is a shard that "
            f"prepare wrote, and {others[0].relative_to(path)} is none; keep one of the two."
        )
    return shards


def shards_size(files: Sequence[Path]) -> int:
    """The tensor-parallel size that shards were cut for, by the first of them."""
    return ShardHeader.from_metadata(SafetensorsFile(files[0]).metadata, files[0]).size


def _read_headers(path: Path, paths: Sequence[Path]) -> dict[SafetensorsFile, ShardHeader]:
    """Every shard with what it says of itself, by rank: each rank's is there, and once."""
    files = map(SafetensorsFile, paths)
    said = {file: ShardHeader.from_metadata(file.metadata, file.path) for file in files}
    by_rank: dict[int, SafetensorsFile] = {}
    first = next(iter(said))
    for file, header in said.items():
        same = (header.size, header.scheme, header.vocab_emb_dp)
        if same != (said[first].size, said[first].scheme, said[first].vocab_emb_dp):
            raise CheckpointError(
                f"{path} must hold the shards of one checkpoint, but {first.path.relative_to(path)} and "
                f"{file.path.relative_to(path)} were not prepared together; keep those of one."
            )
        if header.rank in by_rank:
            raise CheckpointError(
                f"{path} must hold one shard of each rank, but {file.path.relative_to(path)} and "
                f"{by_rank[header.rank].path.relative_to(path)} are both of rank {header.rank}; keep "
                "one of them."
            )
        by_rank[header.rank] = file
    _check_complete(path, by_rank, said[first].size)
    return {by_rank[rank]: said[by_rank[rank]] for rank in sorted(by_rank)}


def _check_complete(path: Path, by_rank: Mapping[int, SafetensorsFile], size: int) -> None:
    if len(by_rank) == size:
        return
    here = ", ".join(map(str, sorted(by_rank)))
    rank, file = min(by_rank.items())
    what = f"is the shard of rank {rank} of {size}"
    if len(by_rank) > 1:
        what = f"belongs to {size} shards, of which those of ranks {here} are there"
    raise CheckpointError(
        f"{file.path} {what}, which alone is no model; copy the shards of all ranks, with their "
        f"directories rank_0 to rank_{size - 1}, to {path}, or give the directory that prepare wrote."
    )


def _layout(config: ModelConfig, header: ShardHeader, file: SafetensorsFile) -> Layout:
    """What `prepare` cuts, with the dtypes and zero points that the shard has."""

    def dtype_of(row: Row) -> str:
        info = file.tensors.get(row.name + SCALE_SUFFIX) or file.tensors.get(row.name)
        return info.dtype if info else config.dtype

    return make_layout(
        config,
        header.scheme,
        vocab_emb_dp=header.vocab_emb_dp,
        dtype_of=dtype_of,
        has_zero_point=lambda row: input_zero_point_name(row) in file.tensors,
    )


def _said(tensor: tuple[tuple[int, ...], str] | None, nothing: str) -> str:
    return nothing if tensor is None else f"{tensor[1]} {list(tensor[0])}"
