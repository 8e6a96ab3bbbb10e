"""The machine that a plan is made for: measured here, or given by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.host.bandwidth import measure_bandwidth_gb_s
from launcher.host.disk import measure_read_gb_s, measure_write_gb_s
from launcher.host.memory import host_bytes
from launcher.schema import Config, PlanSection
from parallel.checkpoint.disk import free_bytes


@dataclass(frozen=True)
class Machine:
    """Speeds in GB/s, sizes in bytes.

    Attributes:
        rank_bandwidth_gb_s: of one rank's memory, where it is given.
        host_bandwidth_gb_s: else of this host's, which its ranks share.
        rank_memory_bytes: of one rank, where it is given; else the host's, shared as well.
        read_gb_s, write_gb_s: of the disks; None where there is no file to measure.
        free_bytes: on the disk of `output`, where that is named.
    """

    rank_bandwidth_gb_s: float | None
    host_bandwidth_gb_s: float | None
    rank_memory_bytes: int | None
    host_memory_bytes: int
    read_gb_s: float | None
    write_gb_s: float | None
    disk_is_given: bool
    rank_flops: float | None
    free_bytes: int | None

    def bandwidth(self, tp: int) -> float:
        """Bytes a second that each of so many ranks can read of its memory."""
        if self.rank_bandwidth_gb_s is not None:
            return self.rank_bandwidth_gb_s * 1e9
        assert self.host_bandwidth_gb_s is not None
        return self.host_bandwidth_gb_s * 1e9 / tp

    def memory(self, tp: int) -> int:
        """Bytes that each of so many ranks has."""
        return self.rank_memory_bytes or self.host_memory_bytes // tp


def describe_machine(config: Config, largest: Path | None) -> Machine:
    """Measure what is not given.

    Args:
        largest: a file of the checkpoint, where there is one.
    """
    section = config.plan
    given = section.bandwidth_gb_s
    read_gb_s, write_gb_s = _disk_speeds(section, largest, config.output)
    return Machine(
        rank_bandwidth_gb_s=given,
        host_bandwidth_gb_s=None if given else measure_bandwidth_gb_s(),
        rank_memory_bytes=int(section.memory_gb * 1e9) if section.memory_gb else None,
        host_memory_bytes=host_bytes(),
        read_gb_s=read_gb_s,
        write_gb_s=write_gb_s,
        disk_is_given=section.disk_gb_s is not None,
        rank_flops=section.tflops * 1e12 if section.tflops else None,
        free_bytes=free_bytes(Path(config.output)) if config.output else None,
    )


def _disk_speeds(
    section: PlanSection, largest: Path | None, output: str | None
) -> tuple[float | None, float | None]:
    if section.disk_gb_s is not None:
        return section.disk_gb_s, section.disk_gb_s
    read_gb_s = measure_read_gb_s(largest) if largest else None
    target = Path(output).absolute() if output else None
    folder = next((path for path in target.parents if path.is_dir()), None) if target else None
    return read_gb_s, measure_write_gb_s(folder) if folder else None
