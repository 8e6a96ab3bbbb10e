"""How a run can end, and what is said then.

    Exception
    +-- ConfigError            a key, value or combination of the configuration   exit 2
    +-- LaunchError            variables of the process that contradict           exit 2
    +-- QuantError             quant/errors.py: a scheme                          exit 2
    +-- CheckpointError        parallel/errors.py: files of a checkpoint          exit 2
    +-- ModelError             parallel/errors.py: a model or its split           exit 2
    +-- PromptError            parallel/errors.py: a prompt                       exit 2
    +-- RunError               a rank failed; leads with the first one            exit 1
    +-- NumericsError          parallel/errors.py: logits that are no numbers     exit 1
    +-- PeerError              parallel/errors.py: a collective broke because of
                               another rank; never the first cause

An assertion is a bug of ours. SIGINT ends with 130, SIGTERM with 143.
"""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel.errors import CheckpointError, ModelError, PeerError, PromptError
from quant.errors import QuantError

EXIT_FAILED = 1
EXIT_USER = 2


class ConfigError(ValueError):
    """A key, a value or a combination that cannot be: one sentence for the user."""


class LaunchError(ValueError):
    """Variables of the environment that contradict each other or the configuration."""


class RunError(RuntimeError):
    """A run that failed, in words: the first line says why, and names the rank where one failed."""


USER_ERRORS = (ConfigError, LaunchError, QuantError, CheckpointError, ModelError, PromptError)


@dataclass(frozen=True)
class ErrorRecord:
    """What a rank leaves behind before it leaves the process group.

    Attributes:
        time_ns: nanoseconds since the epoch; the earliest record is the first cause.
        is_consequence: the rank failed only because another did.
        is_user_error: the message is a sentence for the user.
        traceback: empty where the message says all: of a user's error, and of a RunError.
    """

    rank: int
    host: str
    pid: int
    time_ns: int
    is_consequence: bool
    is_user_error: bool
    exception: str
    message: str
    traceback: str

    @classmethod
    def of(cls, rank: int, error: BaseException) -> ErrorRecord:
        return cls(
            rank=rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            time_ns=time.time_ns(),
            is_consequence=isinstance(error, PeerError),
            is_user_error=isinstance(error, USER_ERRORS),
            exception=type(error).__name__,
            message=str(error),
            traceback=""
            if isinstance(error, (*USER_ERRORS, RunError))
            else "".join(traceback.format_exception(error)),
        )

    def write(self, path: Path) -> None:
        """Leave the record where the launcher looks for it; whole or not at all."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        partial.rename(path)

    @classmethod
    def read(cls, path: Path) -> ErrorRecord:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} failed: {self.exception}: {self.message}"


def one_line(error: object) -> str:
    """A user's error as the one sentence it is, whatever line breaks a name in it has."""
    return str(error).replace("\r", "\\r").replace("\n", "\\n")


def first_cause(records: list[ErrorRecord]) -> ErrorRecord | None:
    """The earliest record that is nobody's consequence, else the earliest of all."""
    by_time = sorted(records, key=lambda record: (record.is_consequence, record.time_ns))
    return by_time[0] if by_time else None
