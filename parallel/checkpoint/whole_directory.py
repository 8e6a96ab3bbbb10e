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
    check_absent(output)
    directory = output.with_name(f".{output.name}.partial-{os.getpid()}")
    with removed_on(BaseException, directory, missing_parents(output)), disk_errors(output):
        directory.mkdir(parents=True)
        yield directory
        name_directory(directory, output)


def check_absent(output: Path) -> None:
    """Raise CheckpointError where something stands at `output`."""
    if os.path.lexists(output):
        raise CheckpointError(f"`output` {output} exists already; choose another or remove it.")


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


@contextmanager
def removed_on(kind: type[BaseException], directory: Path, made: list[Path]) -> Iterator[None]:
    """Remove a directory, and the parents that were `made` for it, on errors of a kind."""
    try:
        yield
    except kind:
        shutil.rmtree(directory, ignore_errors=True)
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def missing_parents(output: Path) -> list[Path]:
    """Those that must be made, the innermost first."""
    return [path for path in output.parents if not path.exists()]


def name_directory(directory: Path, output: Path) -> None:
    """Flush a directory to the disk and give it its name."""
    for path in (*sorted(directory.rglob("*")), directory):
        _sync(path)
    os.rename(directory, output)
    _sync(output.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
