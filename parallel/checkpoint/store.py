"""A prepared checkpoint on disk: one directory of shards a rank, and a manifest.

    DIRECTORY/
      manifest.json               source, mesh, scheme; each tensor's shape, slices and sums
      config.json, tokenizer …    copied from the source
      rank_0/model.safetensors    the slices of rank 0, and so on

It is written aside, flushed to the disk, and renamed: a directory of the final name is whole. What a
killed run leaves, the next one goes on with (unfinished.py). Equal inputs give equal bytes: no time,
host or absolute path is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from parallel.checkpoint.compressed.config import without_quantization
from parallel.checkpoint.conversion import Conversion, ShardFile, read_bytes
from parallel.checkpoint.layout import Layout
from parallel.checkpoint.manifest import write_manifest
from parallel.checkpoint.open import read_config
from parallel.checkpoint.plan_disk import prepared_bytes, weight_files
from parallel.checkpoint.readers.shard_header import FORMAT_VERSION
from parallel.checkpoint.side_files import copy_files
from parallel.checkpoint.source import Source
from parallel.checkpoint.unfinished import Journal, Unfinished
from parallel.errors import CheckpointError
from parallel.group import Group, LoneGroup


def write_prepared(
    layout: Layout,
    source: Source,
    size: int,
    output: Path,
    *,
    ranks: Sequence[int] | None = None,
    overrides: Mapping[str, Any] | None = None,
    tokenizer: Path | None = None,
    group: Group | None = None,
    num_threads: int = 1,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> None:
    """Write the shards of all ranks, or of some; every byte of the source is read once.

    Args:
        size: the ranks that the model is cut for.
        output: must not exist; what a run with the same arguments left unfinished is gone on with.
        ranks: whose shards are written; None: all.
        overrides: values that stand in for those of config.json, also in the copy of it.
        tokenizer: a directory or a file; None: the one beside the source.
        group: processes that share the work, on one file system; rank 0 of it begins and ends it.
        num_threads: tensors that are worked on at a time in this process.
        on_bytes: told the source bytes of each tensor that this process is done with.

    Raises:
        CheckpointError: `output` exists, or was begun with other arguments or by another process; the
            disk is full, or a weight cannot be quantized.
    """
    group = group or LoneGroup()
    ranks = tuple(range(size)) if ranks is None else tuple(ranks)
    config = _own_config(read_config(source.path, overrides), layout)
    unfinished = Unfinished(output, _arguments(layout, source, size, ranks, config, tokenizer))
    if group.rank == 0:
        beside = {"source": source.path, "tokenizer": tokenizer}
        unfinished.check_room(prepared_bytes(layout, size, ranks=ranks, **beside))
    with _owned(group, unfinished):
        if group.rank == 0:
            copy_files(source.path, unfinished.whole, config, tokenizer)
        with _shards(layout, ranks, size, unfinished, group) as shards:
            journal = Journal(unfinished.directory, group.rank)
            try:
                Conversion(layout, source, size, shards, journal).run(
                    _share(read_bytes(layout, source, size, ranks), group), num_threads, on_bytes
                )
            finally:
                journal.close()
        group.barrier()
        if group.rank == 0:
            records = unfinished.read_records()
            write_manifest(unfinished.whole, layout, source, size, ranks, records)
    group.barrier()


def source_bytes(
    layout: Layout, source: Source, size: int = 1, ranks: Sequence[int] | None = None
) -> int:
    """Bytes of the source that are read for a layout, or for the shards of some ranks of it."""
    ranks = range(size) if ranks is None else ranks
    return sum(read_bytes(layout, source, size, ranks).values())


@contextmanager
def _owned(group: Group, unfinished: Unfinished) -> Iterator[None]:
    """Rank 0 locks what is unfinished, and gives it its name; the others only write into it."""
    if group.rank != 0:
        yield
        return
    with unfinished.begun():
        yield


def _check_shared(unfinished: Unfinished) -> None:
    if not unfinished.whole.exists():
        raise CheckpointError(
            f"`output` {unfinished.output} must be on a file system that all processes share, but "
            "this one does not see it; choose another, or start one process for each host with "
            "prepare.ranks."
        )


@contextmanager
def _shards(
    layout: Layout, ranks: Sequence[int], size: int, unfinished: Unfinished, group: Group
) -> Iterator[list[ShardFile]]:
    """The files of all `ranks`, open; rank 0 makes them, the others wait for it."""
    with ExitStack() as stack:

        def opened() -> list[ShardFile]:
            files = (ShardFile(layout, rank, size, unfinished.whole) for rank in ranks)
            return [stack.enter_context(closing(file)) for file in files]

        shards = opened() if group.rank == 0 else []
        group.barrier()
        _check_shared(unfinished)
        yield shards or opened()


def _share(jobs: Mapping[str, int], group: Group) -> dict[str, int]:
    """The source tensors that this process converts: a stretch of the files, by bytes."""
    total, before, mine = max(1, sum(jobs.values())), 0, {}
    for name, size in jobs.items():
        if before * group.size // total == group.rank:
            mine[name] = size
        before += size
    return mine


def _own_config(config: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """What a manifest says of the scheme is not said twice, in another's words; and what the files said
    against a tied lm_head is said."""
    values = without_quantization(config)
    if values.get("tie_word_embeddings") and not layout.config.tie_word_embeddings:
        values["tie_word_embeddings"] = False
    return values


def _arguments(
    layout: Layout,
    source: Source,
    size: int,
    ranks: Sequence[int],
    config: Mapping[str, Any],
    tokenizer: Path | None,
) -> dict[str, Any]:
    """What two runs must have in common to go on with each other's work, by the users' names."""
    return {
        "parallel.tp": size,
        "prepare.ranks": list(ranks),
        "parallel.vocab_emb_dp": layout.vocab_emb_dp,
        "quant": layout.scheme.to_dict(),
        "config.json": dict(config),
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "checkpoint": {"identity": source.identity(), "modified": _times(source)},
        "version": FORMAT_VERSION,
    }


def _times(source: Source) -> dict[str, int]:
    """When each of its files was written last: equal headers may stand before other data."""
    files = weight_files(source.path)
    return {str(file.relative_to(source.path)): file.stat().st_mtime_ns for file in files}
