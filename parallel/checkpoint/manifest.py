"""manifest.json of a prepared directory: where it comes from, how it is cut, and every sum."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.checkpoint.layout import Layout, StoredTensor
from parallel.checkpoint.readers.prepared import MANIFEST
from parallel.checkpoint.readers.shard_header import FORMAT_VERSION
from parallel.checkpoint.source import Source


def write_manifest(
    directory: Path,
    layout: Layout,
    source: Source,
    size: int,
    ranks: Sequence[int],
    records: Mapping[str, Any],
) -> None:
    """Write it for shards that are there.

    Args:
        ranks: whose shards they are, of `size`.
        records: what the journal has of each source tensor.
    """
    sums = {name: record["source"] for name, record in records.items() if record["source"]}
    slices = {
        name: found for record in records.values() for name, found in record["slices"].items()
    }
    manifest = {
        "format": "shardrun",
        "version": FORMAT_VERSION,
        "complete": True,
        "mesh": {"tp": size},
        "ranks": list(ranks),
        "vocab_emb_dp": layout.vocab_emb_dp,
        "scheme": layout.scheme.to_dict(),
        # A prepared source brings the sums of the checkpoint that it was made from.
        "source": {"tensors": dict(sorted(sums.items())), **source.identity()},
        "tensors": {
            stored.name: _entry(stored, size, slices[stored.name]) for stored in layout.tensors
        },
    }
    text = json.dumps(manifest, indent=1)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _entry(stored: StoredTensor, size: int, sums: Mapping[str, str]) -> dict[str, Any]:
    """A rank whose shard is not there has a slice, and no sum."""
    shards: list[dict[str, Any]] = []
    for rank in range(size):
        cuts = [[cut.start, cut.stop] for cut in stored.index(rank, size)]
        found = {"sha256": sums[str(rank)]} if str(rank) in sums else {}
        shards.append({"slice": cuts, **found})
    return {"shape": list(stored.shape), "dtype": stored.dtype, "shards": shards}
