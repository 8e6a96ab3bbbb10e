"""The protobuf message of MindSpore's strategy files. Needs no torch.

`ParallelStrategyMap { uint32 current_stage = 1; ParallelStrategyItem parallel_strategy_item = 2;
ParallelLayoutItem parallel_layout_item = 3 }`, `ParallelLayoutItem { string param_name = 1;
ParallelLayouts parallel_layouts = 2 }`, `ParallelLayouts { DevMatrix dev_matrix = 1; TensorMap
tensor_map = 2; ParamSplitShape param_split_shape = 3; IndicesOffset indices_offset = 4; int32 field = 5;
int32 opt_weight_shard_step = 6; int32 opt_weight_shard_size = 7 }`, each of the first four a message
`{ repeated int dim = 1 }`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from parallel.checkpoint.readers.mindspore.protobuf_fields import (
    Field,
    FieldError,
    fields,
    numbers,
    read_bytes,
    signed,
)

_MOST_NAME_BYTES = 1024
_MOST_DIMS = 16
# The fields of ParallelLayouts, by number; all but the first two must say that there is nothing more.
LAYOUT_KEYS = (
    "dev_matrix", "tensor_map", "param_split_shape", "indices_offset", "field",
    "opt_weight_shard_step", "opt_weight_shard_size",
)  # fmt: skip


def read_message(path: Path) -> dict[str, Mapping[str, Any]]:
    """The layout of each parameter, by the names of its fields.

    Raises:
        FieldError: where the file is no such message.
    """
    found: dict[str, Mapping[str, Any]] = {}
    with path.open("rb") as file:
        for field in fields(file, 0, path.stat().st_size):
            if field.number not in (1, 2, 3):
                raise FieldError(f"it has a field {field.number}")
            if field.number == 3:
                name, values = _read_item(file, field)
                if name in found:
                    raise FieldError(f"{name} is in it twice")
                found[name] = values
    if not found:
        raise FieldError("it names no parameter")
    return found


def _read_item(file: BinaryIO, item: Field) -> tuple[str, dict[str, Any]]:
    held = list(_message(file, item))
    if [field.number for field in held] != [1, 2] or not held[1].is_bytes:
        raise FieldError(f"at byte {item.start:,} there is no layout of a parameter")
    name = read_bytes(file, held[0], _MOST_NAME_BYTES).decode(errors="replace")
    if not name.isprintable():
        raise FieldError(f"at byte {item.start:,} a name is no text")
    return name, _read_layout(file, held[1])


def _read_layout(file: BinaryIO, layout: Field) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in _message(file, layout):
        if field.number > len(LAYOUT_KEYS) or field.is_bytes != (field.number < 5):
            raise FieldError(f"at byte {field.start:,} there is no field of a layout")
        key = LAYOUT_KEYS[field.number - 1]
        if key in values:
            raise FieldError(f"at byte {field.start:,} there is a second {key}")
        values[key] = _dims(file, field) if field.is_bytes else signed(field.value)
    return values


def _dims(file: BinaryIO, message: Field) -> list[int]:
    found: list[int] = []
    for field in _message(file, message):
        if field.number != 1 or len(found) > _MOST_DIMS:
            raise FieldError(f"at byte {field.start:,} there is no list of lengths")
        found += map(signed, numbers(file, field, most=10 * _MOST_DIMS))
    return found


def _message(file: BinaryIO, field: Field) -> Iterator[Field]:
    if not field.is_bytes:
        raise FieldError(f"at byte {field.start:,} there is a number for a message")
    return fields(file, field.start, field.stop)
