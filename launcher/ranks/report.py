"""What a rank says of the error that it ends with."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace

from launcher.failures import EXIT_FAILED, EXIT_USER, USER_ERRORS, ErrorRecord
from launcher.ranks.watch import StuckRankError
from parallel.errors import PeerError


def report(rank: int, error: BaseException) -> int:
    """Say on stderr how this rank ended; the user's own mistakes are said by rank 0 alone."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, USER_ERRORS):
        if rank == 0:
            print(f"shardrun: {error}", file=sys.stderr, flush=True)
        return EXIT_USER
    record = record_of(rank, error)
    _say(rank, error, record)
    _tell_torchrun(error)
    if record.traceback and not record.is_consequence:
        print(record.traceback, file=sys.stderr, flush=True)
    return EXIT_FAILED


def record_of(rank: int, error: BaseException) -> ErrorRecord:
    """The record of an error; one that another rank brought about by hanging is that rank's."""
    record = ErrorRecord.of(rank, error)
    if isinstance(error, StuckRankError):
        place = error.place
        record = replace(
            record,
            rank=error.rank,
            host=place["host"],
            pid=place["pid"],
            message=f"it did not answer: {error.reason}",
        )
    return record


def in_words(error: BaseException) -> str:
    """For the other ranks. What came from another rank says so itself."""
    if isinstance(error, PeerError | StuckRankError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _say(rank: int, error: BaseException, record: ErrorRecord) -> None:
    """What came from another rank leads with that one."""
    is_about_other = isinstance(error, PeerError | StuckRankError)
    line = f"{error} (said rank {rank})" if is_about_other else str(record)
    print(f"shardrun: {line}", file=sys.stderr, flush=True)


def _tell_torchrun(error: BaseException) -> None:
    """Leave the error where torchrun's agent looks for it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if isinstance(error, Exception) and os.environ.get("TORCHELASTIC_ERROR_FILE"):
        get_error_handler().record_exception(error)
