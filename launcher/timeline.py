"""Where the time of a start goes: stages, from the command to the first token."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import launcher

# A process older than this when it comes to us was something else before: a script's `exec`.
_LONGEST_INTERPRETER_S = 5.0


@dataclass
class Timeline:
    """The stages of a start, in order; it goes from the launcher to the ranks.

    Attributes:
        started_at: when the command started, in seconds since the epoch, as all times here.
        ends: each stage with its end; a stage begins where the one before ends.
    """

    started_at: float
    ends: list[tuple[str, float]] = field(default_factory=list)

    @classmethod
    def of_command(cls) -> Timeline:
        """From the start of this process, with its first two stages."""
        timeline = cls(_process_started_at())
        timeline.mark("interpreter", launcher.IMPORTED_AT)
        timeline.mark("imports")
        return timeline

    def mark(self, stage: str, at: float | None = None) -> None:
        """A stage ends, now or at a given time; not before it began."""
        begin = self.ends[-1][1] if self.ends else self.started_at
        self.ends.append((stage, max(begin, time.time() if at is None else at)))

    def durations(self) -> dict[str, float]:
        """Seconds of each stage to 0.1 ms, as `STAGE_s`."""
        begins = [self.started_at, *(end for _, end in self.ends)]
        pairs = zip(begins, self.ends, strict=False)
        return {f"{stage}_s": round(end - begin, 4) for begin, (stage, end) in pairs}


def _process_started_at() -> float:
    """What the kernel says, to 10 ms; else when our package was first imported."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s
    except (OSError, AttributeError):
        return launcher.IMPORTED_AT
    started_at = min(time.time() - age_s, launcher.IMPORTED_AT)
    is_ours = launcher.IMPORTED_AT - started_at < _LONGEST_INTERPRETER_S
    return started_at if is_ours else launcher.IMPORTED_AT
