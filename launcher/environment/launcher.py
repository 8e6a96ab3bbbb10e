"""Launcher: one that gives each process its rank in variables of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launcher(ABC):
    """A launcher and the names of its variables.

    Attributes:
        size: of the job, in ranks.
        local_size: the ranks on this host.
    """

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str

    def has_started(self, environ: Mapping[str, str]) -> bool:
        """Whether this process is one of its ranks; a variable that is empty says nothing."""
        return bool(environ.get(self.rank) and environ.get(self.size))

    @abstractmethod
    def store(self, environ: Mapping[str, str], size: int) -> str | None:
        """Where the rendezvous is; None where one host has all ranks: rank 0 picks a free port.

        Raises:
            LaunchError: the variables do not say.
        """

    @abstractmethod
    def job(self, environ: Mapping[str, str], parent_pid: int) -> str:
        """The same on all ranks of a job, and only there.

        Args:
            parent_pid: tells jobs of one host apart where the launcher gives no number.
        """
