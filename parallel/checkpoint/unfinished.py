"""What a prepare has done so far, so that the next one goes on from there.

    .OUTPUT.partial/
      arguments.json      what is prepared, and how: another prepare may not go on with it
      journal_0.jsonl     a line for each source tensor that process 0 has converted
      whole/              what becomes OUTPUT; its shards have gaps

A line of a journal is written after the data it speaks of. It holds their sums, which are compared
with what the files hold before anything is skipped: neither a kill nor a power cut can leave a wrong
tensor behind.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parallel.checkpoint.disk import check_disk
from parallel.checkpoint.json_file import read_json_object
from parallel.checkpoint.whole_directory import (
    check_absent,
    disk_errors,
    missing_parents,
    name_directory,
    removed_on,
)
from parallel.errors import CheckpointError

_ARGUMENTS = "arguments.json"
_LONGEST_VALUE = 60
_BLOCK_BYTES = 512  # of stat


class Unfinished:
    """The directory beside `output`, of which a part becomes it.

    Args:
        arguments: what two runs must have in common to go on with each other's work, by name.

    Attributes:
        whole: the part that becomes `output`.
    """

    def __init__(self, output: Path, arguments: Mapping[str, Any]) -> None:
        self.output = output
        self.directory = unfinished_path(output)
        self.whole = self.directory / "whole"
        self._arguments: dict[str, Any] = json.loads(json.dumps(arguments))

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Locked while it is worked on; named at the end.

        A signal or a kill leaves it; an error that the next run would meet again removes it.

        Raises:
            CheckpointError: `output` exists, another process writes it, or it was begun with other
                arguments.
        """
        self._tidy()
        check_absent(self.output)
        made = missing_parents(self.output)
        with disk_errors(self.output):
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            self._lock(lock)
            # Whoever held the lock before may have finished it.
            check_absent(self.output)
            self._begin()
            with removed_on(CheckpointError, self.directory, made), disk_errors(self.output):
                self.whole.mkdir(exist_ok=True)
                yield
                name_directory(self.whole, self.output)
                shutil.rmtree(self.directory)
        finally:
            os.close(lock)

    def check_room(self, num_bytes: int) -> None:
        """Raise CheckpointError unless the disk has room for what of `num_bytes` is not there yet."""
        there = sum(file.stat().st_blocks * _BLOCK_BYTES for file in self.whole.glob("rank_*/*"))
        check_disk(self.output, num_bytes - there)

    def read_records(self) -> dict[str, Any]:
        """What all processes have noted, by source tensor."""
        return dict(_read_lines(self.directory))

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"`output` {self.output} is being written by another prepare; wait for it, or choose "
                "another."
            ) from error

    def _begin(self) -> None:
        """Write the arguments down, or compare them with those of an earlier run."""
        path = self.directory / _ARGUMENTS
        if path.exists():
            self._compare(self._read_arguments(path))
            return
        written = self.directory / f"{_ARGUMENTS}.new"
        if set(self.directory.iterdir()) - {written}:
            raise CheckpointError(
                f"`output` {self.output} needs {self.directory} to write in, which holds other files; "
                "move them."
            )
        with written.open("w", encoding="utf-8") as file:
            json.dump(self._arguments, file)
            file.flush()
            os.fsync(file.fileno())
        written.rename(path)

    def _read_arguments(self, path: Path) -> dict[str, Any]:
        try:
            return read_json_object(path)
        except CheckpointError as error:
            raise CheckpointError(
                f"`output` {self.output} cannot be gone on with, as {path} is damaged; remove "
                f"{self.directory} to begin anew."
            ) from error

    def _compare(self, before: Mapping[str, Any]) -> None:
        for key, now in self._arguments.items():
            if before.get(key) != now:
                raise CheckpointError(
                    f"`output` {self.output} was begun with another {key}"
                    f"{_told(before.get(key), now)}; prepare it with that to go on, or remove "
                    f"{self.directory} to begin anew."
                )

    def _tidy(self) -> None:
        """What a run left that was killed after it had named its output."""
        if self.output.exists() and self.directory.exists() and not self.whole.exists():
            shutil.rmtree(self.directory)


def unfinished_path(output: Path) -> Path:
    """Where `output` is written until it is whole."""
    return output.with_name(f".{output.name}.partial")


class Journal:
    """What all processes have noted so far, and a file for this one's notes.

    Args:
        number: of this process.
    """

    def __init__(self, directory: Path, number: int) -> None:
        self.records: Mapping[str, Any] = dict(_read_lines(directory))
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
        self._fd = os.open(directory / f"journal_{number}.jsonl", flags, 0o644)

    def add(self, name: str, record: Any) -> None:
        """Note that a source tensor is converted; any thread may."""
        # The newline before parts it from a line that a kill has torn.
        os.write(self._fd, f"\n{json.dumps([name, record])}".encode())

    def close(self) -> None:
        os.close(self._fd)


def _read_lines(directory: Path) -> Iterator[tuple[str, Any]]:
    """Whole notes alone: what is torn by a kill or of another form is done again."""
    for path in sorted(filter(Path.is_file, directory.glob("journal_*.jsonl"))):
        for line in path.read_bytes().split(b"\n"):
            try:
                note = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if _is_note(note):
                yield note[0], note[1]


def _is_note(note: Any) -> bool:
    """Whether it is [source tensor, {"source": its sum, "slices": {stored tensor: {rank: sum}}}]."""
    if not (isinstance(note, list) and len(note) == 2 and isinstance(note[0], str)):
        return False
    record = note[1]
    if not (isinstance(record, dict) and record.keys() == {"source", "slices"}):
        return False
    slices = record["slices"]
    return (
        (record["source"] is None or isinstance(record["source"], str))
        and isinstance(slices, dict)
        and all(isinstance(by_rank, dict) for by_rank in slices.values())
    )


def _told(before: object, now: object) -> str:
    """Small values are shown."""
    shown = [json.dumps(value) for value in (before, now)]
    return f" ({shown[0]}, now {shown[1]})" if max(map(len, shown)) < _LONGEST_VALUE else ""
