"""The header of a .safetensors file, read once and checked before anything else is done with it.

    8 bytes       N, little-endian
    N bytes       JSON: {name: {"dtype": …, "shape": […], "data_offsets": [begin, end]}, …}
    the rest      the tensors' bytes, C-contiguous; offsets count from here

Source: https://github.com/huggingface/safetensors (README, "Format"). It asks that names differ, that
the offsets cover the rest of the file without holes, and that a tensor's bytes are those of its shape.
What the library takes and the format does not know (fields of other names, entries as lists) is refused:
the names, shapes and offsets that are checked here are the ones that are read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.checkpoint.json_file import distinct
from parallel.checkpoint.regular_file import check_regular, reason
from parallel.checkpoint.source import DTYPE_BYTES, DTYPE_NAMES, TensorInfo
from parallel.errors import CheckpointError

_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_FIELDS = {"dtype", "shape", "data_offsets"}
# Of a header; those of the largest models have a few MB, and JSON in memory takes twenty times as much.
_MOST_BYTES = 32 << 20


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors.

    Attributes:
        offsets: where each tensor begins in the file.
        metadata: the strings that the writer left.
        size: bytes of the whole file.
        sha256: of the header, with the eight bytes of its length.
    """

    infos: Mapping[str, TensorInfo]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]
    size: int
    sha256: str


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as one, whatever it is called: a length that it has, and a mapping."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            head, size = file.read(_LENGTH_BYTES + 1), file.seek(0, 2)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); copy it again.") from error
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    return head[_LENGTH_BYTES:] == b"{" and length <= size - _LENGTH_BYTES


def read_header(path: Path) -> Header:
    """Raises CheckpointError where the file is cut off, or its header is none."""
    check_regular(path)
    try:
        head, size = _read_head(path)
        entries = json.loads(
            head[8:].decode("utf-8"), object_pairs_hook=distinct, parse_constant=_no_constant
        )
        return _checked(entries, head, size, path)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({reason(error)}); copy it again."
        ) from error


def _read_head(path: Path) -> tuple[bytes, int]:
    """The header with its length, and the size of the file; nothing is allocated beyond that."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = file.read(8)
        num_bytes = int.from_bytes(length, "little")
        if len(length) < 8 or num_bytes > size - 8:
            raise ValueError(f"its header has {num_bytes:,} bytes, the file {size:,}")
        if num_bytes > _MOST_BYTES:
            raise ValueError(
                f"its header has {num_bytes:,} bytes, at most {_MOST_BYTES:,} are read"
            )
        return length + file.read(num_bytes), size


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no value of JSON")


def _checked(entries: Any, head: bytes, size: int, path: Path) -> Header:
    if not isinstance(entries, dict):
        raise ValueError(f"its header is a {type(entries).__name__}")
    metadata = _metadata(entries.pop(_METADATA, {}))
    cuts = {name: _cut(name, entry) for name, entry in entries.items()}
    _check_cover(cuts, size - len(head))
    return Header(
        infos={name: _info(name, entry, path) for name, entry in entries.items()},
        offsets={name: len(head) + begin for name, (begin, _) in cuts.items()},
        metadata=metadata,
        size=size,
        sha256=hashlib.sha256(head).hexdigest(),
    )


def _metadata(values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or not all(type(value) is str for value in values.values()):
        raise ValueError(f"its {_METADATA} is not of strings")
    return values


def _cut(name: str, entry: Any) -> tuple[int, int]:
    """Begin and end of a tensor; every field has its type."""
    name.encode()  # half a character would break whoever prints it
    if not isinstance(entry, dict) or entry.keys() != _FIELDS or type(entry["dtype"]) is not str:
        raise ValueError(f"the entry of {name!r} is not dtype, shape and data_offsets")
    if not _are_lengths(entry["shape"]) or not _are_lengths(entry["data_offsets"]):
        raise ValueError(f"{name!r} has a shape or offsets that are no lists of whole numbers")
    if len(entry["data_offsets"]) != 2:
        raise ValueError(f"{name!r} has {len(entry['data_offsets'])} offsets")
    begin, end = entry["data_offsets"]
    return begin, end


def _are_lengths(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def _check_cover(cuts: Mapping[str, tuple[int, int]], num_bytes: int) -> None:
    """The tensors lie side by side, from the first byte of the data to the last."""
    position = 0
    for name, (begin, end) in sorted(cuts.items(), key=lambda item: item[1]):
        if begin != position or end < begin:
            raise ValueError(f"{name!r} lies at {begin} to {end}, not from {position} on")
        position = end
    if position != num_bytes:
        raise ValueError(
            f"its tensors have {position:,} bytes, but {num_bytes:,} follow the header"
        )


def _info(name: str, entry: Mapping[str, Any], path: Path) -> TensorInfo:
    """Raises CheckpointError for a dtype that weights do not have."""
    code, shape = entry["dtype"], tuple(entry["shape"])
    if code not in DTYPE_NAMES:
        raise CheckpointError(
            f"{path}: the tensor {name} must have one of the dtypes {', '.join(DTYPE_NAMES)}, but has "
            f"{code}; save it in one of them."
        )
    begin, end = entry["data_offsets"]
    dtype = DTYPE_NAMES[code]
    if math.prod(shape) * DTYPE_BYTES[dtype] != end - begin:
        raise ValueError(f"{name!r} is {code} of shape {list(shape)[:8]} in {end - begin} bytes")
    return TensorInfo(shape, dtype, path.name)
