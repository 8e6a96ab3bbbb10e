"""Member: a rank that has met the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TextIO

import torch.distributed as dist

from launcher.ranks.place import Place, is_here


@dataclass(frozen=True)
class Member:
    """A rank that has arrived, where all of them run, and the store that they share.

    Attributes:
        store_host: who hosts the store, in words.
        console: where this rank says what it waits for.
    """

    store: dist.Store
    rank: int
    size: int
    local_rank: int
    places: list[Place]
    hosts_store: bool
    store_host: str
    console: TextIO

    @property
    def is_one_host(self) -> bool:
        return all(is_here(place) for place in self.places)

    @property
    def ranks_here(self) -> list[int]:
        """The ranks on this machine, this one included."""
        return [rank for rank, place in enumerate(self.places) if is_here(place)]
