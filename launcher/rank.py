"""Rank: what a task's part on one rank is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TextIO

import torch

from launcher.job import Job
from launcher.run_dir import RunDir
from parallel.group import Group


@dataclass(frozen=True)
class Rank:
    """One rank at work.

    Attributes:
        console: where progress is shown; the terminal, also when stderr goes to a log.
        started_at: when the command started, in seconds since the epoch.
    """

    job: Job
    group: Group
    device: torch.device
    run_dir: RunDir
    console: TextIO
    started_at: float
