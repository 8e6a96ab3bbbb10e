"""The records of a MindSpore `.ckpt`: which tensors there are and where their bytes lie.

The file is a run of messages `Checkpoint { repeated Value value = 1 }`, `Value { string tag = 1;
TensorProto tensor = 2; MapTensorProto maptensor = 3 }`, `TensorProto { repeated int64 dims = 1; string
tensor_type = 2; bytes tensor_content = 3 }`, and perhaps the checksum of all of it. There is no index
and no count, so a file that was cut between two records is a shorter file: who knows the model
compares names. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from parallel.checkpoint.readers.mindspore.chunks import Chunk, StoredTensor
from parallel.checkpoint.readers.mindspore.protobuf_fields import (
    Field,
    FieldError,
    fields,
    numbers,
    read_bytes,
)

# MindSpore's name of a dtype: torch's, and bytes of an entry. An entry of Int4 (qint4x2) is a byte
# with two values, of which the shape counts one.
DTYPES: Mapping[str, tuple[str, int]] = {
    "Float32": ("float32", 4), "Float16": ("float16", 2), "BFloat16": ("bfloat16", 2),
    "Float64": ("float64", 8), "Int8": ("int8", 1), "UInt8": ("uint8", 1), "Int16": ("int16", 2),
    "UInt16": ("uint16", 2), "Int32": ("int32", 4), "UInt32": ("uint32", 4), "Int64": ("int64", 8),
    "UInt64": ("uint64", 8), "Bool": ("bool", 1), "Int4": ("uint8", 1),
}  # fmt: skip
# The trailer: this word, and the checksum in ten bytes, the highest first.
_SUM_WORD = b"crc_num"
TRAILER_BYTES = len(_SUM_WORD) + 10
# A parameter of a host cache is called NAME.__param_key__NUMBER.
_KEY_SUFFIX = ".__param_key__"
_MOST_DIMS = 8
_MOST_NAME_BYTES = 1024


@dataclass(frozen=True)
class Records:
    """All of a file.

    Attributes:
        crc32: the checksum that stands at its end, or None.
    """

    tensors: dict[str, StoredTensor]
    crc32: int | None


def scan_records(file: BinaryIO, size: int) -> Records:
    """Read what stands between the contents of the tensors.

    Raises:
        FieldError: what is wrong with the file, and where.
    """
    tensors: dict[str, StoredTensor] = {}
    last, crc32 = "", _read_trailer(file, size)
    end = size if crc32 is None else size - TRAILER_BYTES
    for field in fields(file, 0, end):
        if field.number != 1 or not field.is_bytes:
            raise FieldError(f"at byte {field.start:,} there is no record of a tensor")
        name, stored = _read_value(file, field)
        if name == last:
            _append(name, tensors[name], stored)
        elif name in tensors:
            raise FieldError(f"the tensor {name} is in it twice")
        else:
            tensors[name] = stored
        last = name
    for name, stored in tensors.items():
        _check_size(name, stored)
    return Records(tensors, crc32)


def _read_trailer(file: BinaryIO, size: int) -> int | None:
    """The checksum, if the file ends with one; it has 32 bits, so six bytes of it are zeros."""
    if size < TRAILER_BYTES:
        return None
    file.seek(size - TRAILER_BYTES)
    trailer = file.read(TRAILER_BYTES)
    value = int.from_bytes(trailer[len(_SUM_WORD) :], "big")
    return value if trailer.startswith(_SUM_WORD) and value < 1 << 32 else None


def _read_value(file: BinaryIO, value: Field) -> tuple[str, StoredTensor]:
    found = _distinct(file, value)
    if 3 in found:
        raise FieldError("it holds a MapTensor, which is not read")
    if found.keys() != {1, 2}:
        raise FieldError(f"at byte {value.start:,} a record has no name or no tensor")
    name = _text(file, found[1]).partition(_KEY_SUFFIX)[0]
    if not name:
        raise FieldError(f"at byte {value.start:,} a tensor has an empty name")
    return name, _read_tensor(file, name, found[2])


def _read_tensor(file: BinaryIO, name: str, tensor: Field) -> StoredTensor:
    dims: list[int] = []
    found: dict[int, Field] = {}
    for field in fields(file, tensor.start, tensor.stop):
        if field.number == 1:
            dims += numbers(file, field, most=10 * _MOST_DIMS)
            _check_dims(name, dims)
        elif field.number not in (2, 3) or field.number in found:
            raise FieldError(f"the tensor {name} has a field {field.number} that it must not have")
        else:
            found[field.number] = field
    if 2 not in found or not found.get(3, tensor).is_bytes:
        raise FieldError(f"the tensor {name} has no dtype or no content")
    word = _text(file, found[2])
    dtype, item_bytes = _dtype(name, word)
    chunks = [Chunk(found[3].start, found[3].value)] if 3 in found and found[3].value else []
    shape = () if dims == [0] and chunks else tuple(dims)
    return StoredTensor(word, dtype, item_bytes, shape, chunks)


def _dtype(name: str, word: str) -> tuple[str, int]:
    if word not in DTYPES:
        raise FieldError(
            f"{name} has the type {word}, which is not read (known: {', '.join(DTYPES)})"
        )
    return DTYPES[word]


def _check_dims(name: str, dims: list[int]) -> None:
    if len(dims) > _MOST_DIMS or any(length >= 1 << 48 for length in dims):
        raise FieldError(f"the tensor {name} cannot have the shape {dims[: _MOST_DIMS + 1]}")


def _append(name: str, stored: StoredTensor, chunk: StoredTensor) -> None:
    """Every chunk of a large tensor repeats its name, shape and type."""
    if (stored.word, stored.shape) != (chunk.word, chunk.shape) or not chunk.chunks:
        raise FieldError(f"the tensor {name} is in it twice")
    stored.chunks += chunk.chunks


def _check_size(name: str, stored: StoredTensor) -> None:
    held = sum(chunk.num_bytes for chunk in stored.chunks)
    if held != stored.num_bytes:
        raise FieldError(
            f"the tensor {name}, {stored.dtype} {list(stored.shape)}, must have "
            f"{stored.num_bytes:,} bytes, but has {held:,}"
        )


def _distinct(file: BinaryIO, message: Field) -> dict[int, Field]:
    """The fields of a message by number, none of which may occur twice or be a number."""
    found: dict[int, Field] = {}
    for field in fields(file, message.start, message.stop):
        if field.number in found or field.number > 3 or not field.is_bytes:
            raise FieldError(f"at byte {field.start:,} there is a field that no record has")
        found[field.number] = field
    return found


def _text(file: BinaryIO, field: Field) -> str:
    """A name, fit to be shown on one line."""
    raw = read_bytes(file, field, _MOST_NAME_BYTES)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise FieldError(f"at byte {field.start:,} a name is no text") from error
    if not text.isprintable():
        raise FieldError(f"at byte {field.start:,} a name is no text")
    return text
