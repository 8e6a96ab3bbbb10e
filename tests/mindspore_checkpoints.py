"""MindSpore's checkpoint and strategy files, written down apart from the product's reader."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

TYPE_NAMES = {
    torch.float32: "Float32", torch.float16: "Float16", torch.bfloat16: "BFloat16",
    torch.float64: "Float64", torch.int8: "Int8", torch.uint8: "UInt8", torch.int16: "Int16",
    torch.int32: "Int32", torch.int64: "Int64", torch.bool: "Bool",
}  # fmt: skip


def write_ckpt(
    path: Path, tensors: Mapping[str, Tensor], *, slice_bytes: int = 512 << 20, crc: bool = False
) -> Path:
    """As `mindspore.save_checkpoint` writes it, whose slices have 512 MiB."""
    data = ckpt_bytes(tensors, slice_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data + trailer(data) if crc else data)
    return path


def ckpt_bytes(tensors: Mapping[str, Tensor], slice_bytes: int = 512 << 20) -> bytes:
    return b"".join(
        record(name, list(tensor.shape), TYPE_NAMES[tensor.dtype], raw[at : at + slice_bytes])
        for name, tensor in tensors.items()
        for raw in [tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()]
        for at in range(0, len(raw), slice_bytes)
    )


def trailer(data: bytes) -> bytes:
    return b"crc_num" + zlib.crc32(data).to_bytes(10, "big")


def record(name: str, dims: list[int], kind: str, content: bytes, *, packed: bool = False) -> bytes:
    """One `Checkpoint` of one `Value`."""
    listed = b"".join(varint(length) for length in dims)
    shape = field(1, listed) if packed else b"".join(number(1, length) for length in dims)
    tensor = shape + field(2, kind.encode()) + field(3, content)
    return field(1, field(1, name.encode()) + field(2, tensor))


def write_strategy(
    path: Path, layouts: Mapping[str, tuple[list[int], list[int]]], stage: int = 1
) -> Path:
    """`dev_matrix` and `tensor_map` of each parameter, with the fields that a real file has."""
    items = b"".join(
        field(3, field(1, name.encode()) + field(2, layout_message(devices, axes)))
        for name, (devices, axes) in layouts.items()
    )
    first = next(iter(layouts))
    strategy = number(1, 0) + field(2, number(1, 2) + number(1, 1))
    node = field(2, field(1, f"MatMul_{first}".encode()) + field(2, strategy))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(number(1, stage) + node + items)
    return path


def layout_message(devices: list[int], axes: list[int], *, field_slices: int = 0) -> bytes:
    dims = [b"".join(number(1, value % (1 << 64)) for value in row) for row in (devices, axes)]
    return (
        field(1, dims[0])
        + field(2, dims[1])
        + number(5, field_slices)
        + number(6, 0)
        + number(7, 0)
    )


def field(at: int, content: bytes) -> bytes:
    return varint(at << 3 | 2) + varint(len(content)) + content


def number(at: int, value: int) -> bytes:
    return varint(at << 3) + varint(value)


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the highest bit set."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def spread(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of which no two entries nearby are equal."""
    return (torch.arange(math.prod(shape)).remainder(101) - 50).reshape(shape).to(dtype)
