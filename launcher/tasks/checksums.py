"""verify_checksums: a prepared checkpoint is hashed before it is used."""

from __future__ import annotations

import torch

from launcher.output import num_writers
from launcher.ranks.rank import Rank
from launcher.schema import Config
from parallel.checkpoint.open import Checkpoint
from parallel.checkpoint.readers.prepared import PreparedSource
from parallel.checkpoint.sums import check_shards


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
        CheckpointError: a sum is not the manifest's.
    """
    if config.verify_checksums and isinstance(checkpoint.source, PreparedSource):
        check_shards(checkpoint.source, checkpoint.source.ranks, num_writers())
