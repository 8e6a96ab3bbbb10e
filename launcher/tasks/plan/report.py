"""All that a plan found, and its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from launcher.tasks.plan.machine import Machine
from launcher.tasks.plan.sizes import SizePlan
from parallel.checkpoint.layout import Layout
from parallel.checkpoint.plan import Workload
from parallel.checkpoint.plan_disk import SourceSize


@dataclass(frozen=True)
class Report:
    """A plan of several sizes.

    Attributes:
        tp: the size that is asked for, whose output must find room.
        sizes: by tensor-parallel size, of those that work.
        errors: of those that were asked for and do not: a sentence each.
        obstacles: why others do not, by reason.
    """

    layout: Layout
    workload: Workload
    machine: Machine
    source: SourceSize
    tp: int
    sizes: Mapping[int, SizePlan]
    errors: Mapping[int, str]
    obstacles: Mapping[str, list[int]]

    @property
    def output_fits(self) -> bool | None:
        """Whether the disk of `output` has room for the asked size; None: no output is named."""
        free = self.machine.free_bytes
        return None if free is None else self.sizes[self.tp].output_bytes <= free

    def to_dict(self) -> dict[str, Any]:
        machine, layout = self.machine, self.layout
        sizes: dict[int, dict[str, Any]] = {tp: plan.to_dict() for tp, plan in self.sizes.items()}
        sizes |= {tp: {"error": text} for tp, text in self.errors.items()}
        return {
            "architecture": layout.config.architecture,
            "scheme": layout.scheme.to_dict(),
            "workload": asdict(self.workload),
            "bandwidth_gb_s": machine.rank_bandwidth_gb_s or machine.host_bandwidth_gb_s,
            "machine": asdict(machine),
            "source": {"bytes": self.source.num_bytes, "basis": self.source.basis},
            "tp": self.tp,
            "output_fits": self.output_fits,
            "valid_tp_sizes": list(layout.valid_tp_sizes()),
            "obstacles": [{"reason": why, "sizes": tps} for why, tps in self.obstacles.items()],
            "sizes": dict(sorted(sizes.items())),
        }
