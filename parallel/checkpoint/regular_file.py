"""What every file of a checkpoint must be before it is opened."""

from __future__ import annotations

import os
from pathlib import Path
from stat import S_ISREG

from parallel.errors import CheckpointError


def check_regular(path: Path, most_bytes: int | None = None) -> None:
    """Refuse what would hang or flood its reader: a pipe, a device, a directory.

    Raises:
        CheckpointError: the path is missing, is no regular file or symbolic link to one, or has
            more than `most_bytes`.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing; give the directory of a whole checkpoint."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); copy it again.") from error
    if not S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} must be a regular file, but is none; copy it again.")
    if most_bytes is not None and status.st_size > most_bytes:
        raise CheckpointError(
            f"{path} must have at most {most_bytes:,} bytes, but has {status.st_size:,}; "
            "copy it again."
        )


def check_directory(path: Path, key: str) -> None:
    """Refuse a directory that cannot be listed or entered; `key` is what the user named it by."""
    try:
        os.listdir(os.path.join(path, "."))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"`{key}` {path} is not a directory that can be read ({reason(error)}); "
            "give a checkpoint's directory."
        ) from error


def reason(error: Exception) -> str:
    """Why a file was not read, on one line and without its path."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
