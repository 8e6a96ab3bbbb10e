"""WorkerEnvironment: what the launcher of this process says of rank and size, whichever it was."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Claim:
    """What somebody says of the number of ranks."""

    name: str
    size: int


@dataclass(frozen=True)
class WorkerEnvironment:
    """What the process environment says.

    Attributes:
        launcher: torchrun, mindspore, openmpi, pmi, slurm; plain where we start the ranks.
        size: number of ranks that the launcher started; None if plain.
        rank: None if plain, in the scheduler, or where it is handed out at the rendezvous.
        local_rank: rank on this host, if the launcher says it.
        is_scheduler: MindSpore's extra process, which hosts the rendezvous.
        store: "host:port" of the rendezvous, or None where rank 0 opens one.
        job: what tells this job from others on the same host, where rank 0 opens the rendezvous.
        requested_size: MS_WORKER_NUM without MS_ROLE: a wish for so many ranks.
        stray_size: WORLD_SIZE without RANK: a leftover that must not be passed over in silence,
            unless it says what the launcher says.
        start_timeout_s: the launcher's own deadline for the rendezvous, if it says one.
        notes: what the user should know; said on stderr.
    """

    launcher: str = "plain"
    size: int | None = None
    rank: int | None = None
    local_rank: int | None = None
    is_scheduler: bool = False
    store: str | None = None
    job: str = ""
    requested_size: int | None = None
    stray_size: int | None = None
    start_timeout_s: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        return self.launcher == "plain"

    @property
    def claim(self) -> Claim | None:
        """The number of ranks that the launcher has started, or that MS_WORKER_NUM wishes for."""
        if self.size is not None:
            return Claim(f"{self.launcher}'s number of ranks", self.size)
        return Claim("MS_WORKER_NUM", self.requested_size) if self.requested_size else None

    @property
    def speaks(self) -> bool:
        """Whether this process says what all processes of the job would say alike."""
        return self.is_plain or self.rank == 0

    @property
    def announcement(self) -> Path:
        """The file in which rank 0 leaves its port for the others, where nobody names a store."""
        return Path(tempfile.gettempdir()) / f"shardrun-{os.getuid()}-{self.job}.json"
