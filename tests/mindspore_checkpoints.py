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


# What MindFormers' own conversion replaces in a name, in this order.
REPLACED = {
    "embed_tokens.weight": "tok_embeddings.embedding_weight", "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "model.norm.": "model.norm_out.",
}  # fmt: skip
CUT_ROWS = ("wq", "wk", "wv", "w1", "w3")
CUT_COLUMNS = ("wo", "w2")


def to_mindformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by MindFormers' names."""
    renamed = {}
    for name, tensor in weights.items():
        for theirs, ours in REPLACED.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def rank_weights(
    weights: Mapping[str, Tensor], rank: int, size: int, num_kv_heads: int, whole: tuple[str, ...]
) -> dict[str, Tensor]:
    """A rank's part of MindFormers' tensors.

    Args:
        whole: names of the tensors of the outer modules that are not cut.
    """
    return {
        name: tensor if name in whole else _rank_part(name, tensor, rank, size, num_kv_heads)
        for name, tensor in weights.items()
    }


def _rank_part(name: str, tensor: Tensor, rank: int, size: int, num_kv_heads: int) -> Tensor:
    *_, module, kind = name.split(".")
    if module in ("wk", "wv") and num_kv_heads < size:
        return tensor.chunk(num_kv_heads)[rank * num_kv_heads // size]
    if module in CUT_ROWS or name in ("lm_head.weight", "model.tok_embeddings.embedding_weight"):
        return tensor.chunk(size)[rank]
    if module in CUT_COLUMNS and kind == "weight":
        return tensor.chunk(size, dim=1)[rank]
    return tensor


def fuse(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """q k v as `w_qkv`, gate and up as `w_gate_hidden`, of the whole or of a rank's part."""
    fused = dict(weights)
    for name in weights:
        for first, others, together in (
            ("attention.wq.", ("wk", "wv"), "w_qkv"),
            ("feed_forward.w1.", ("w3",), "w_gate_hidden"),
        ):
            if first in name:
                word = first.split(".")[1]
                names = [name, *(name.replace(f".{word}.", f".{other}.") for other in others)]
                parts = [fused.pop(part) for part in names]
                fused[name.replace(f".{word}.", f".{together}.")] = torch.cat(parts)
    return fused


def layouts(names: list[str], devices: list[int], whole: tuple[str, ...]) -> dict[str, tuple]:
    """What a strategy file says where the last dimension of the grid cuts and others repeat."""
    found = {}
    for name in names:
        *_, module, kind = name.split(".")
        is_matrix = not ("norm" in name or kind == "bias")
        axes = [-1, -1] if is_matrix else [-1]
        if module in (*CUT_ROWS, "w_qkv", "w_gate_hidden"):
            axes[0] = 0
        elif is_matrix and module in CUT_COLUMNS:
            axes[1] = 0
        elif name not in whole and is_matrix:
            axes[0] = 0
        found[name] = (devices, axes)
    return found
