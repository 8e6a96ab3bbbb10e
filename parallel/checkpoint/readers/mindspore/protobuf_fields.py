"""The fields of protobuf messages in a file, found by seeking over their contents.

A message is a run of fields: a varint (field number << 3 | wire type), then a varint, or a length and
as many bytes (https://protobuf.dev/programming-guides/encoding). Only these two kinds, 0 and 2, occur
in what MindSpore writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_VARINT, _BYTES = 0, 2
# Of a number of 64 bits, seven in a byte.
_LONGEST_VARINT = 10


class FieldError(ValueError):
    """Bytes that are no such message; says where and why, for a reader's sentence."""


@dataclass(frozen=True)
class Field:
    """One field of a message.

    Attributes:
        value: the number of a varint; of bytes, how many there are.
        start: where the bytes begin in the file.
        is_bytes: whether it is bytes, or a message, rather than a number.
    """

    number: int
    value: int
    start: int
    is_bytes: bool

    @property
    def stop(self) -> int:
        return self.start + self.value


def fields(file: BinaryIO, start: int, stop: int) -> Iterator[Field]:
    """The fields of the message that lies at [start, stop); the contents of bytes are not read.

    Raises:
        FieldError: a field that is cut off, reaches beyond `stop`, or is of no kind that is written.
    """
    while start < stop:
        field = _field(file, start, stop)
        yield field
        start = field.stop if field.is_bytes else field.start


def read_bytes(file: BinaryIO, field: Field, most: int) -> bytes:
    """The content of a field of bytes, of which there may be so many."""
    if not field.is_bytes or field.value > most:
        kind = f"{field.value:,} bytes" if field.is_bytes else "a number"
        raise FieldError(f"at byte {field.start:,} there must be at most {most} bytes, not {kind}")
    file.seek(field.start)
    return file.read(field.value)


def numbers(file: BinaryIO, field: Field, most: int) -> list[int]:
    """The numbers of a repeated field: one, or several packed into at most `most` bytes."""
    if not field.is_bytes:
        return [field.value]
    if field.value > most:
        raise FieldError(f"at byte {field.start:,} there are {field.value:,} bytes of numbers")
    found, at = [], field.start
    while at < field.stop:
        value, at = _varint(file, at, field.stop)
        found.append(value)
    return found


def signed(value: int) -> int:
    """What a varint of 64 bits means in a signed field."""
    return value - (1 << 64) if value >> 63 else value


def _field(file: BinaryIO, start: int, stop: int) -> Field:
    key, at = _varint(file, start, stop)
    number, kind = key >> 3, key & 7
    if kind not in (_VARINT, _BYTES) or not number:
        raise FieldError(f"at byte {start:,} there is no field")
    value, at = _varint(file, at, stop)
    if kind == _BYTES and value > stop - at:
        raise FieldError(
            f"at byte {start:,} there should be {value:,} bytes, but {stop - at:,} are left"
        )
    return Field(number, value, at, kind == _BYTES)


def _varint(file: BinaryIO, start: int, stop: int) -> tuple[int, int]:
    """A number and where it ends; its bytes hold seven bits each, the lowest first."""
    file.seek(start)
    value = 0
    for place, byte in enumerate(file.read(min(_LONGEST_VARINT, stop - start))):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80 and value < 1 << 64:
            return value, start + place + 1
    raise FieldError(f"at byte {start:,} a number is cut off or too long")
