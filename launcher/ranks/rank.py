"""Rank: what a task's part on one rank is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

import torch

from launcher.host.seat import Taken
from launcher.job import Job
from launcher.run_dir import RunDir
from launcher.timeline import Timeline
from parallel.group import Group

# Of what a rank says of itself, in JSON.
_WORDS_BYTES = 8192


@dataclass(frozen=True)
class Rank:
    """One rank at work.

    Attributes:
        console: where progress is shown; the terminal, also when stderr goes to a log.
        timeline: the stages of the start so far.
        seat: its cores and threads.
        say_doing: what it is at, for those that wait for it; "": nothing of note.
    """

    job: Job
    group: Group
    device: torch.device
    run_dir: RunDir
    console: TextIO
    timeline: Timeline
    seat: Taken
    say_doing: Callable[[str], None]

    def gather(self, words: dict[str, Any]) -> list[dict[str, Any]] | None:
        """What each rank says, in rank order on rank 0, None elsewhere; all ranks must call it."""
        text = json.dumps(words).encode().ljust(_WORDS_BYTES)
        assert len(text) == _WORDS_BYTES, len(text)
        mine = torch.frombuffer(bytearray(text), dtype=torch.int64).to(self.device)
        parts = self.group.gather(mine)
        if parts is None:
            return None
        return [json.loads(part.cpu().numpy().tobytes()) for part in parts]
