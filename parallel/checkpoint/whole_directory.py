"""A directory that is there whole or not at all: written aside, flushed to the disk, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parallel.checkpoint.regular_file import reason
from parallel.errors import CheckpointError


@contextmanager
def renamed_when_whole(output: Path) -> Iterator[Path]:
    """A directory beside `output` that gets its name at the end, or is removed on an error."""
    if os.path.lexists(output):
        raise CheckpointError(f"`output` {output} exists already; choose another or remove it.")
    directory = output.with_name(f".{output.name}.partial-{os.getpid()}")
    made = [path for path in output.parents if not path.exists()]
    try:
        with disk_errors(output):
            directory.mkdir(parents=True)
            yield directory
            _sync_tree(directory)
            os.rename(directory, output)
            _sync(output.parent)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """A full disk and its kin as a sentence; `where` is what could not be written."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{where} could not be written ({reason(error)}); nothing was left behind, "
            "free some space or choose another `output`."
        ) from error


def _sync_tree(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
