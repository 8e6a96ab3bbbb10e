"""mpirun: Open MPI's, and those that speak PMI (MPICH, Intel MPI)."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.environment.launcher import Launcher
from launcher.environment.slurm import address_of_rank_0
from launcher.environment.variables import positive


class Mpi(Launcher):
    """It names no address; on several hosts a Slurm job around it may."""

    def store(self, environ: Mapping[str, str], size: int) -> str | None:
        if positive(environ, self.local_size) in (None, size):
            return None
        nodes = environ.get("SLURM_JOB_NODELIST", "")
        return address_of_rank_0(self, environ, size, nodes, step=None)

    def job(self, environ: Mapping[str, str], parent_pid: int) -> str:
        if "PMIX_NAMESPACE" in environ:
            return f"{self.name}-{environ['PMIX_NAMESPACE'].replace('/', '-')}"
        return f"{self.name}-{parent_pid}"


OPENMPI = Mpi(
    "openmpi",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
PMI = Mpi("pmi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
