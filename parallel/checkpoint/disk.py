"""The disk that a checkpoint is written to: what it has free, asked before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

from parallel.checkpoint.regular_file import reason
from parallel.errors import CheckpointError


def check_disk(output: Path, num_bytes: int) -> None:
    """Foresee a full disk.

    Args:
        output: where will be written; neither it nor its parents need exist.
        num_bytes: what is still to be written.

    Raises:
        CheckpointError: the disk has less room than that, or cannot be asked.
    """
    free = free_bytes(output)
    if num_bytes > free:
        raise CheckpointError(
            f"`output` {output} needs {num_bytes / 1e9:,.3f} GB, but its disk has "
            f"{free / 1e9:,.3f} GB free; free some, or choose an `output` on another disk."
        )


def free_bytes(path: Path) -> int:
    """Bytes that a user who is not root may still write where `path` is, or will be made.

    Raises:
        CheckpointError: the nearest directory above cannot be asked.
    """
    try:
        status = os.statvfs(_nearest(path))
    except OSError as error:
        raise CheckpointError(
            f"`output` {path} has a disk that cannot be asked for its room ({reason(error)}); "
            "choose another."
        ) from error
    return status.f_bavail * status.f_frsize


def _nearest(path: Path) -> Path:
    """The path, or the nearest of its parents, that exists."""
    return next(found for found in (path, *path.absolute().parents) if os.path.exists(found))
