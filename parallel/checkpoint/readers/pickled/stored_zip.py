"""The directory of a zip archive whose entries lie uncompressed, so that a map of it can be viewed.

Offsets, lengths and names are those of the archive's own directory, checked against each entry's
local header and against the size of the file before anything is read by them. The layout is that of
PKWARE's APPNOTE 6.3, with zip64 for what is above 4 GB. Needs no torch.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from parallel.checkpoint.regular_file import reason
from parallel.errors import CheckpointError

_END = struct.Struct("<4s4xHHLLH")  # signature, entries here, entries, size, offset, comment
_END_64_LOCATOR = struct.Struct("<4s4xQ4x")  # signature, offset of the zip64 end
_END_64 = struct.Struct("<4s20xQQQQ")  # signature, entries here, entries, size, offset
# signature, flags, method, crc, packed size, size, lengths of name, extra and comment, offset
_CENTRAL = struct.Struct("<4s4xHH4xLLLHHH8xL")
_LOCAL = struct.Struct("<4s2xHH16xHH")  # signature, flags, method, lengths of name and extra
_LONGEST_COMMENT = 0xFFFF
_ENCRYPTED = 0x2041
_IN_EXTRA = 0xFFFFFFFF
_ZIP64_EXTRA = 1
# The largest models have some thousand tensors a file, and 80 bytes here for each.
_MOST_DIRECTORY_BYTES = 16 << 20


@dataclass(frozen=True)
class ZipEntry:
    """Where the bytes of one entry lie in the file; `crc` is 0 where the writer took no sum."""

    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class _Header:
    name: bytes
    flags: int
    method: int
    entry: ZipEntry


class StoredZip:
    """An archive whose directory was read and checked.

    Attributes:
        entries: by name.
        directory: the bytes of the directory, which hold a CRC of every entry.

    Raises:
        CheckpointError: not a whole archive; or entries that are compressed, encrypted, of one name,
            or that overlap each other or the end of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                parser = _Parser(path, file)
        except OSError as error:
            raise _damaged(path, reason(error)) from error
        self.entries: Mapping[str, ZipEntry] = parser.entries
        self.directory = parser.directory

    def read(self, name: str, most_bytes: int) -> bytes:
        """The bytes of a small entry, compared with their CRC."""
        entry, shown = self.entries[name], _shown(name.encode())
        if entry.size > most_bytes:
            raise _damaged(
                self.path, f"{shown} has {entry.size:,} bytes, and at most {most_bytes:,} are read"
            )
        try:
            with self.path.open("rb") as file:
                data = os.pread(file.fileno(), entry.size, entry.offset)
        except OSError as error:
            raise _damaged(self.path, reason(error)) from error
        if len(data) != entry.size or (entry.crc and zlib.crc32(data) != entry.crc):
            raise _damaged(self.path, f"the sum of {shown} is another")
        return data


class _Parser:
    """Reads the directory of an open file, from its end."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._fd = file.fileno()
        self.size = os.fstat(self._fd).st_size
        num_entries, self._end = self._read_end()
        self.entries = self._read_entries(num_entries)

    def _read_end(self) -> tuple[int, int]:
        """The number of entries and where their directory ends; sets `directory`."""
        start = max(0, self.size - _END.size - _LONGEST_COMMENT)
        tail = self._bytes(start, self.size - start)
        at = tail.rfind(b"PK\5\6")
        if at < 0 or at + _END.size > len(tail):
            raise self._damaged("its directory is missing at the end")
        _, here, count, size, offset, comment = _END.unpack_from(tail, at)
        if at + _END.size + comment != len(tail):
            raise self._damaged("bytes follow its end")
        end = start + at
        locator = _END_64_LOCATOR.size
        if end >= locator and self._bytes(end - locator, 4) == b"PK\6\7":
            _, end_64 = _END_64_LOCATOR.unpack(self._bytes(end - locator, locator))
            end = self._checked(end_64, _END_64.size, end - locator)
            signature, here, count, size, offset = _END_64.unpack(self._bytes(end, _END_64.size))
            if signature != b"PK\6\6":
                raise self._damaged("its zip64 end is missing")
        if here != count or offset + size != end or size > _MOST_DIRECTORY_BYTES:
            raise self._damaged("its directory is not where its end says")
        self.directory = self._bytes(offset, size)
        return count, offset

    def _read_entries(self, num_entries: int) -> dict[str, ZipEntry]:
        entries: dict[str, ZipEntry] = {}
        stretches: list[tuple[int, int]] = []
        for header in self._headers():
            name, start, entry = self._resolve(header)
            if name in entries:
                raise self._damaged(f"two entries are called {_shown(header.name)}")
            entries[name] = entry
            stretches.append((start, entry.offset + entry.size))
        if len(entries) != num_entries:
            raise self._damaged(f"its directory has {len(entries)} entries of {num_entries}")
        self._check_apart(stretches)
        return entries

    def _headers(self) -> Iterator[_Header]:
        """The directory's, whose offsets are still those of the local headers."""
        at = 0
        while at < len(self.directory):
            if at + _CENTRAL.size > len(self.directory):
                raise self._damaged("its directory is cut off")
            signature, flags, method, crc, packed, size, *lengths, offset = _CENTRAL.unpack_from(
                self.directory, at
            )
            fields_at = at + _CENTRAL.size
            at = fields_at + sum(lengths)
            if signature != b"PK\1\2" or at > len(self.directory):
                raise self._damaged("its directory is no list of entries")
            name = self.directory[fields_at : fields_at + lengths[0]]
            extra = self.directory[fields_at + lengths[0] : at - lengths[2]]
            size, packed, offset = self._long_fields([size, packed, offset], extra)
            if size != packed or method != 0:
                raise self._refused(name, "compressed")
            if flags & _ENCRYPTED:
                raise self._refused(name, "encrypted")
            yield _Header(name, flags, method, ZipEntry(offset, size, crc))

    def _long_fields(self, fields: list[int], extra: bytes) -> list[int]:
        """Those that say so are replaced, in order, by the eight-byte ones of the zip64 extra."""
        longs = iter(_zip64_values(extra))
        replaced = [next(longs, None) if field == _IN_EXTRA else field for field in fields]
        found = [field for field in replaced if field is not None]
        if len(found) != len(fields):
            raise self._damaged("a zip64 length is missing")
        return found

    def _resolve(self, header: _Header) -> tuple[str, int, ZipEntry]:
        """An entry's name, where its local header begins, and where its bytes do."""
        entry, start = header.entry, header.entry.offset
        self._checked(start, _LOCAL.size, self._end)
        signature, flags, method, name_length, extra_length = _LOCAL.unpack(
            self._bytes(start, _LOCAL.size)
        )
        name_at = start + _LOCAL.size
        data_at = name_at + name_length + extra_length
        self._checked(data_at, entry.size, self._end)
        found = (signature, flags, method, self._bytes(name_at, name_length))
        if found != (b"PK\3\4", header.flags, header.method, header.name):
            raise self._damaged(f"the directory and the entry {_shown(header.name)} disagree")
        try:
            return header.name.decode(), start, ZipEntry(data_at, entry.size, entry.crc)
        except UnicodeDecodeError as error:
            raise self._damaged(f"{_shown(header.name)} is no name") from error

    def _check_apart(self, stretches: list[tuple[int, int]]) -> None:
        stretches.sort()
        for (_, stop), (start, _) in pairwise(stretches):
            if start < stop:
                raise self._damaged("two of its entries overlap")

    def _checked(self, offset: int, length: int, end: int) -> int:
        if offset + length > end:
            raise self._damaged(f"an entry ends at byte {offset + length:,}, beyond the last")
        return offset

    def _bytes(self, offset: int, length: int) -> bytes:
        self._checked(offset, length, self.size)
        data = os.pread(self._fd, length, offset)
        if len(data) != length:
            raise self._damaged("it became shorter while it was read")
        return data

    def _damaged(self, what: str) -> CheckpointError:
        return _damaged(self.path, what)

    def _refused(self, name: bytes, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: the entry {_shown(name)} is {what}, as torch.save never writes it; load "
            "it and save it again with torch.save."
        )


def _zip64_values(extra: bytes) -> list[int]:
    """The eight-byte fields of a directory entry's zip64 extra, if it has one."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == _ZIP64_EXTRA and at + 4 + length <= len(extra):
            return list(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
        at += 4 + length
    return []


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a whole file of torch.save ({what}); copy it again.")


def _shown(name: bytes) -> str:
    return repr(name[:80].decode(errors="replace"))
