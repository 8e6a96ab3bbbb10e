"""Export: a prepared checkpoint, of any size, as one Hugging Face checkpoint.

What is not quantized is written as it is; what is, in the form of compressed-tensors, which
transformers and vLLM read: nothing is rounded again, as the integers and their scales are the
prepared ones. A row of the table is in hand at a time, one a thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.checkpoint.compressed.config import (
    KEY,
    PACKED,
    CompressedLinear,
    format_of,
    write_quantization,
)
from parallel.checkpoint.compressed.words import num_words, to_words
from parallel.checkpoint.layout import Layout, StoredTensor
from parallel.checkpoint.open import read_config
from parallel.checkpoint.planned_file import PlannedFile, PlannedTensor
from parallel.checkpoint.readers.huggingface import INDEX_NAME
from parallel.checkpoint.side_files import copy_files
from parallel.checkpoint.source import Source
from parallel.checkpoint.whole_directory import renamed_when_whole
from parallel.errors import CheckpointError
from parallel.model.placements import HEAD, Row
from quant.numeric import unpack_int4
from quant.scheme import LinearScheme

SINGLE_FILE = "model.safetensors"


def write_export(
    layout: Layout,
    source: Source,
    output: Path,
    *,
    max_shard_bytes: int,
    overrides: Mapping[str, Any] | None = None,
    tokenizer: Path | None = None,
    num_threads: int = 1,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> None:
    """Write one checkpoint of all ranks' parts.

    Args:
        layout: of the prepared source.
        output: must not exist.
        max_shard_bytes: of the weights in a file; one tensor may be more.
        overrides: values that stand in for those of config.json, also in the copy of it.
        tokenizer: a directory or a file; None: the one beside the source.
        num_threads: rows that are worked on at a time; memory is bounded by that many.
        on_bytes: told the bytes of each row when it is written.

    Raises:
        CheckpointError: `output` exists, the disk is full, or compressed-tensors has no place for
            the scheme of a module.
    """
    check_exportable(layout)
    planned = {row.name: list(_plan_row(layout, row)) for row in layout.table.values()}
    shards = _deal(planned, max_shard_bytes)
    with renamed_when_whole(output) as directory:
        config = _own_config(layout, read_config(source.path, overrides))
        copy_files(source.path, directory, config, tokenizer)
        files = _open_files(directory, planned, shards)

        def convert(row: Row) -> None:
            for name, tensor in _export_row(layout, source, row).items():
                files[row.name].write(name, tensor)
            on_bytes(sum(tensor.num_bytes for tensor in planned[row.name]))

        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(convert, layout.table.values()))
        for file in dict.fromkeys(files.values()):
            file.close()


def export_bytes(layout: Layout) -> int:
    """Bytes of the weights that will be written."""
    return sum(
        tensor.num_bytes for row in layout.table.values() for tensor in _plan_row(layout, row)
    )


def check_exportable(layout: Layout) -> None:
    """Raise CheckpointError, naming the scheme, where compressed-tensors or vLLM has none like it."""
    if layout.scheme.kvcache_dtype is not None:
        raise CheckpointError(
            f"an int8 KV cache with a scale {layout.scheme.kvcache_quant_granularity} cannot be "
            "exported: compressed-tensors has no place for it; prepare the checkpoint without "
            "quant.kvcache_dtype."
        )
    for name, scheme in layout.schemes.items():
        _check_linear(layout.table[name], scheme)


def _check_linear(row: Row, scheme: LinearScheme) -> None:
    size, columns = scheme.group_size, row.shape[1]
    if scheme.weight_dtype == "int8" and scheme.activation_dtype and size is not None:
        raise CheckpointError(
            f"{scheme.label} ({row.module}) cannot be exported: beside int8 activations vLLM takes "
            "int8 weights per channel alone; prepare it with "
            "quant.weight_quant_granularity=per_channel."
        )
    if size is not None and columns % size:
        raise CheckpointError(
            f"{scheme.label} ({row.module}, {columns} columns) cannot be exported: in "
            f"compressed-tensors no last group is short; prepare it with a quant.group_size that "
            "divides the columns, or leave the module out."
        )


def _own_config(layout: Layout, config: dict[str, Any]) -> dict[str, Any]:
    """config.json with the scheme, and with lm_head untied where it has integers of its own."""
    if not layout.schemes:
        return config
    untied = {"tie_word_embeddings": False} if HEAD in layout.schemes else {}
    linears = {row.module: _held(layout, row) for row in layout.table.values() if row.is_linear}
    # A tied lm_head is no row, but a module that transformers would quantize.
    linears.setdefault(HEAD.removesuffix(".weight"), None)
    return {**config, **untied, KEY: write_quantization(linears)}


def _held(layout: Layout, row: Row) -> CompressedLinear | None:
    scheme = layout.schemes.get(row.name)
    if scheme is None:
        return None
    return CompressedLinear(scheme, format_of(scheme), layout.has_zero_point(row))


def _plan_row(layout: Layout, row: Row) -> Iterator[PlannedTensor]:
    """What the export holds of a row."""
    parts = layout.parts[row.name]
    scheme = layout.schemes.get(row.name)
    if scheme is None:
        yield from (PlannedTensor(part.name, part.shape, part.dtype) for part in parts)
        return
    if format_of(scheme) == PACKED:
        words = (row.shape[0], num_words(row.shape[1], scheme.bits))
        yield PlannedTensor(f"{row.name}_packed", words, "int32")
        yield PlannedTensor(f"{row.name}_shape", (2,), "int64")
    else:
        yield PlannedTensor(row.name, row.shape, "int8")
    yield from (PlannedTensor(part.name, part.shape, part.dtype) for part in parts[1:])


def _export_row(layout: Layout, source: Source, row: Row) -> dict[str, Tensor]:
    """The tensors that `_plan_row` promised."""
    parts = layout.parts[row.name]
    tensors = {part.name: source.read(part.name, _whole(part)) for part in parts}
    scheme = layout.schemes.get(row.name)
    if scheme is None:
        return tensors
    stored, columns = tensors.pop(row.name), row.shape[1]
    if format_of(scheme) == PACKED:
        tensors[f"{row.name}_packed"] = to_words(stored, columns, scheme.bits)
        tensors[f"{row.name}_shape"] = torch.tensor(row.shape)
    else:
        tensors[row.name] = unpack_int4(stored, columns) if scheme.bits == 4 else stored
    return tensors


def _whole(part: StoredTensor) -> tuple[slice, ...]:
    return tuple(slice(0, length) for length in part.shape)


def _deal(planned: Mapping[str, list[PlannedTensor]], max_bytes: int) -> list[list[str]]:
    """The rows of each file, in their order; a row is never divided."""
    shards: list[list[str]] = [[]]
    filled = 0
    for row, tensors in planned.items():
        num_bytes = sum(tensor.num_bytes for tensor in tensors)
        if shards[-1] and filled + num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(row)
        filled += num_bytes
    return shards


def _open_files(
    directory: Path, planned: Mapping[str, list[PlannedTensor]], shards: list[list[str]]
) -> dict[str, PlannedFile]:
    """The file of each row; with an index where there are several."""
    files: dict[str, PlannedFile] = {}
    places: dict[str, str] = {}
    for number, rows in enumerate(shards, 1):
        name = SINGLE_FILE
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = [tensor for row in rows for tensor in planned[row]]
        file = PlannedFile(directory / name, tensors, {})
        files |= dict.fromkeys(rows, file)
        places |= {tensor.name: name for tensor in tensors}
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensors in planned.values() for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files
