"""verify_checksums: a prepared checkpoint is hashed before it is used."""

from __future__ import annotations

import torch

from launcher.output import num_writers
from launcher.ranks.rank import Rank
from launcher.schema import Config
from parallel.checkpoint.open import Checkpoint
from parallel.checkpoint.readers.mindformers.source import MindFormersSource
from parallel.checkpoint.readers.prepared import PreparedSource
from parallel.checkpoint.sums import check_shards
from parallel.errors import CheckpointError


def check_own_shards(rank: Rank) -> None:
    """Hash the shard of this rank; of a checkpoint of another size, this rank's part of the shards.

    Raises:
        CheckpointError: a sum is not the manifest's.
    """
    source = PreparedSource(rank.job.checkpoint)
    shards = source.ranks[rank.group.rank :: rank.group.size]
    check_shards(source, shards, torch.get_num_threads())
    rank.timeline.mark("verify_checksums")


def check_all_shards(config: Config, checkpoint: Checkpoint) -> None:
    """Hash what one process is about to read, where that is asked for.

    Raises:
        CheckpointError: a sum is not the manifest's, or that of a MindSpore file.
    """
    source = checkpoint.source
    if config.verify_checksums and isinstance(source, PreparedSource):
        check_shards(source, source.ranks, num_writers())
    elif config.verify_checksums and isinstance(source, MindFormersSource):
        _check_files(source)


def _check_files(source: MindFormersSource) -> None:
    if unsummed := source.check_sums():
        raise CheckpointError(
            f"`verify_checksums` is true, but {source.path} has no checksum in {', '.join(unsummed)}; "
            "leave it out."
        )
