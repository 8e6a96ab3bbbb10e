"""What a checkpoint takes on a disk, before and after `prepare`. Needs no torch, and reads no weight."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.checkpoint.json_file import read_json_object
from parallel.checkpoint.layout import Layout, make_layout
from parallel.checkpoint.readers.huggingface import find_files, find_index, names_weights
from parallel.checkpoint.readers.prepared import SHARD_FILE, is_prepared
from parallel.checkpoint.readers.shard_header import ShardHeader
from parallel.checkpoint.side_files import side_files
from quant.scheme import QuantScheme

# Of each form; MindFormers' and Golden Stick's may lie in a directory a rank.
_WEIGHTS = (
    "*.safetensors", "*.bin", "*.pth", "*.ckpt", "rank_*/*.safetensors", "rank_*/*.ckpt",
)  # fmt: skip
# From above, beside the name: an entry of a shard's header, a tensor of the manifest (its shape, and the
# sum of its source), and a shard of that (two slices and a sum, which the journal of an unfinished one
# has as well).
_HEADER_ENTRY, _MANIFEST_ENTRY, _MANIFEST_SHARD = 110, 250, 360
_BLOCK = 4096


@dataclass(frozen=True)
class SourceSize:
    """How large a source is, and what says so.

    Attributes:
        largest: its largest file, where there are files.
    """

    num_bytes: int
    basis: str
    largest: Path | None = None


def source_size(path: Path | None, layout: Layout) -> SourceSize:
    """Bytes of the weights: of the files that are there, else what the index says, else the config."""
    files = weight_files(path) if path is not None else []
    if files:
        sizes = {file: file.stat().st_size for file in files}
        return SourceSize(sum(sizes.values()), "its files", max(files, key=sizes.__getitem__))
    total = _index_total(path) if path is not None else None
    if total is not None:
        return SourceSize(total, "its index")
    plain = make_layout(layout.config, QuantScheme())
    return SourceSize(plain.rank_bytes(0, 1), "its config.json")


def weight_files(path: Path) -> list[Path]:
    """The files of a directory that hold weights: those of its index, where all of them are there, else
    those of the first form that is."""
    if is_prepared(path):
        return sorted(path.glob(f"rank_*/{SHARD_FILE}"))
    if names_weights(path):
        named = find_files(path)
        return named if len(_regular(named)) == len(named) else []
    found = (sorted(path.glob(pattern)) for pattern in _WEIGHTS)
    return next((_regular(files) for files in found if files), [])


def prepared_bytes(
    layout: Layout,
    size: int,
    *,
    ranks: Sequence[int] | None = None,
    source: Path | None = None,
    tokenizer: Path | None = None,
) -> int:
    """What `prepare` writes, from above: shards with their headers, manifest, the files beside.

    Args:
        ranks: whose shards are written; None: those of all.
        source: the directory whose config.json and tokenizer are copied.
        tokenizer: in place of the source's.
    """
    ranks = range(size) if ranks is None else ranks
    names = [len(tensor.name) for tensor in layout.tensors]
    said = ShardHeader(size - 1, size, layout.scheme, layout.vocab_emb_dp).to_metadata()
    header = sum(names) + _HEADER_ENTRY * (len(names) + 1) + len(json.dumps(said))
    manifest = 3 * sum(names) + (_MANIFEST_ENTRY + _MANIFEST_SHARD * size) * len(names)
    copied = _regular([*side_files(source, tokenizer).values()]) if source else []
    beside = sum(file.stat().st_size for file in copied)
    rounding = _BLOCK * (2 * len(ranks) + len(copied) + 3)
    shards = sum(layout.rank_bytes(rank, size) for rank in ranks)
    return shards + header * len(ranks) + manifest + beside + rounding


def _regular(files: Sequence[Path]) -> list[Path]:
    return [file for file in files if file.is_file()]


def _index_total(path: Path) -> int | None:
    """`metadata.total_size` of an index, which some writers leave out."""
    index = find_index(path)
    metadata: Any = read_json_object(index).get("metadata") if index is not None else None
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return total if type(total) is int and total > 0 else None
