"""check: every sum of a prepared checkpoint, and that nothing is missing, changed or too much.

Status 0: all good. 1: it was checked, and is damaged. 2: it cannot be checked.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from launcher.environment.worker import WorkerEnvironment
from launcher.failures import ConfigError, RunError
from launcher.progress import open_bar
from launcher.resolve import open_job
from launcher.schema import Config
from parallel.checkpoint.readers.mindformers.source import MindFormersSource
from parallel.checkpoint.readers.prepared import MANIFEST, SHARD_FILE, PreparedSource
from parallel.checkpoint.side_files import COPIED_FILES
from parallel.checkpoint.source import Source
from parallel.checkpoint.sums import Piece, list_pieces, wrong_pieces
from parallel.errors import CheckpointError
from quant.scheme import QuantScheme

_MOST_NAMED = 5


def run(config: Config, _environment: WorkerEnvironment) -> None:
    """Print what was found.

    Raises:
        ConfigError: no checkpoint is named, or a key has no effect.
        CheckpointError: a header, the manifest or config.json contradicts another.
        RunError: sums that are wrong, or shards that do not belong here.
    """
    _check_keys(config)
    checkpoint = open_job(config)
    path = checkpoint.path
    checkpoint.layout(QuantScheme())
    if isinstance(checkpoint.source, PreparedSource):
        _check_prepared(checkpoint.source)
        return
    print(
        f"{path}: {len(checkpoint.source.tensors):,} tensors have the names, shapes and dtypes of "
        f"its config, and files of the right size; {_found_sums(checkpoint.source)}"
    )


def _found_sums(source: Source) -> str:
    """What is known of the values of a source that prepare did not write."""
    unsummed: tuple[str, ...] = ()
    if isinstance(source, MindFormersSource):
        try:
            with _bar(None) as bar:
                unsummed = source.check_sums(bar.update)
        except CheckpointError as error:
            raise RunError(f"{source.path} is damaged: {error}") from error
        if not unsummed:
            return "the checksum of every file is right"
        if len(unsummed) < len(source.files):
            return f"the checksums are right, but {', '.join(unsummed)} has none"
    return "it has no sums, so changed values cannot be seen (prepare takes sums of what it reads)"


def _check_keys(config: Config) -> None:
    if config.checkpoint is None:
        raise ConfigError("check needs `checkpoint`; write checkpoint=DIRECTORY.")
    if config.output is not None:
        raise ConfigError("`output` has no effect on check, which writes nothing; drop it.")


def _check_prepared(source: PreparedSource) -> None:
    pieces = list_pieces(source, source.ranks)
    num_bytes = sum(piece.num_bytes for piece in pieces)
    started = time.perf_counter()
    wrong = _wrong(pieces, num_bytes)
    seconds = time.perf_counter() - started
    faults = [*_faults(wrong), *_strays(source)]
    if faults:
        raise RunError(f"{source.path} is damaged: {'; '.join(faults)}")
    ranks = f"{len(source.ranks)} of {source.size}" if len(source.ranks) < source.size else "all"
    print(
        f"{source.path}: all good, {len(pieces):,} sums of {ranks} ranks' shards, "
        f"{num_bytes / 1e9:.3g} GB in {seconds:.1f} s ({num_bytes / 1e9 / max(seconds, 1e-9):.2f} GB/s)"
    )
    if unsummed := _unsummed(source):
        print(f"without a sum, only looked at: {', '.join(unsummed)}")


def _wrong(pieces: Sequence[Piece], num_bytes: int) -> list[Piece]:
    """All cores hash; nothing else is to be done meanwhile."""
    with _bar(num_bytes) as bar:
        return wrong_pieces(pieces, len(os.sched_getaffinity(0)), bar.update)


def _bar(num_bytes: int | None) -> tqdm[Any]:
    return open_bar(
        sys.stderr, total=num_bytes, unit="B", unit_scale=True, desc="check", leave=False
    )


def _faults(wrong: Sequence[Piece]) -> list[str]:
    """A clause for each shard file with wrong sums: how many, and which first."""
    counts = Counter(piece.path for piece in wrong)
    return [
        f"{path} has {count} wrong {'sum' if count == 1 else 'sums'} ({_named(wrong, path)})"
        for path, count in counts.items()
    ]


def _named(wrong: Sequence[Piece], path: Path) -> str:
    names = [piece.name for piece in wrong if piece.path == path]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _strays(source: PreparedSource) -> list[str]:
    """Weights that the manifest does not list: what lies in or beside the ranks' directories."""
    wanted = {Path(f"rank_{rank}", SHARD_FILE) for rank in source.ranks}
    found = {
        file.relative_to(source.path)
        for pattern in ("rank_*", "rank_*/*", "*.safetensors")
        for file in source.path.glob(pattern)
        if pattern != "rank_*" or not _holds_shard(source, file)
    }
    # Other names of a shard, as quant_ckpt.py makes them, are no weights of their own.
    shards = {os.path.realpath(source.path / name) for name in wanted}
    strays = sorted(
        str(name) for name in found if os.path.realpath(source.path / name) not in shards
    )
    return [f"its manifest does not list {', '.join(strays)}"] if strays else []


def _holds_shard(source: PreparedSource, folder: Path) -> bool:
    return folder.name in {f"rank_{rank}" for rank in source.ranks}


def _unsummed(source: PreparedSource) -> list[str]:
    """The files beside the shards."""
    names = {file.name for file in source.path.iterdir() if not file.name.startswith("rank_")}
    known = [name for name in COPIED_FILES if name in names]
    return [*known, *sorted(names - {*known, MANIFEST})]
