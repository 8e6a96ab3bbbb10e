"""torchrun, or a script that sets its variables by hand."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.environment.launcher import Launcher
from launcher.environment.variables import port
from launcher.failures import LaunchError


class Torchrun(Launcher):
    """Its agent hosts a store, and tells every rank where."""

    def store(self, environ: Mapping[str, str], size: int) -> str:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if missing:
            raise LaunchError(
                f"RANK and WORLD_SIZE are set, but {' and '.join(missing)} not; "
                "launch with torchrun, or unset RANK and WORLD_SIZE."
            )
        return f"{environ['MASTER_ADDR']}:{port(environ, 'MASTER_PORT')}"

    def job(self, environ: Mapping[str, str], parent_pid: int) -> str:
        # Its store outlives a restart of the ranks, who must not meet those of the round before.
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        return "-".join([self.name, *(environ.get(name, "0") for name in names)])


TORCHRUN = Torchrun("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def check_stray_rank(environ: Mapping[str, str]) -> None:
    """A RANK without WORLD_SIZE is a leftover that would silently mean nothing."""
    if environ.get("RANK") and not environ.get("WORLD_SIZE"):
        raise LaunchError(
            f"RANK={environ['RANK']} is set without WORLD_SIZE; unset RANK, or launch with "
            "torchrun."
        )
