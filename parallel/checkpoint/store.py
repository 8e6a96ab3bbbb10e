"""A prepared checkpoint on disk: one directory of shards a rank, and a manifest.

    DIRECTORY/
      manifest.json               source, mesh, scheme; each tensor's shape, slices and sums
      config.json, tokenizer …    copied from the source
      rank_0/model.safetensors    the slices of rank 0, and so on

It is written under a temporary name, flushed to the disk, and renamed: a directory of the final
name is whole. Equal inputs give equal bytes: no time, host or absolute path is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.checkpoint.json_file import read_json_object
from parallel.checkpoint.layout import Layout, StoredTensor
from parallel.checkpoint.readers.prepared import FORMAT_VERSION, MANIFEST, SHARD_FILE
from parallel.checkpoint.regular_file import check_regular, reason
from parallel.checkpoint.shard import read_weight, source_name, weight_parts
from parallel.checkpoint.source import DTYPE_BYTES, DTYPE_NAMES, Source
from parallel.errors import CheckpointError
from parallel.model.config import override_config
from parallel.model.placements import Row
from parallel.placement import Index, index_shape

COPIED_FILES = (
    "config.json", "generation_config.json", "tokenizer.model", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_CODES = {name: code for code, name in DTYPE_NAMES.items()}


def write_prepared(
    layout: Layout,
    source: Source,
    size: int,
    output: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    num_threads: int = 1,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> None:
    """Write the shards of all ranks; every byte of the source is read once.

    Args:
        output: must not exist.
        overrides: values that stand in for those of config.json, also in the copy of it.
        num_threads: tensors that are worked on at a time; memory is bounded by that many.
        on_bytes: told the source bytes of each tensor when it is done.

    Raises:
        CheckpointError: `output` exists, the disk is full, or a weight cannot be quantized.
    """
    source = _SummedSource(source)
    with _renamed_when_whole(output) as directory:
        _copy_files(source.path, directory, overrides or {})
        shards = [_ShardFile(layout, rank, size, directory) for rank in range(size)]
        sums: dict[str, Any] = {}

        def convert(row: Row) -> None:
            sums[row.name] = _write_row(layout, source, row, shards)
            on_bytes(source_bytes(source, row))

        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(convert, layout.table.values()))
        for shard in shards:
            shard.close()
        _write_manifest(directory, _manifest(layout, source, size, sums))


def source_bytes(source: Source, row: Row) -> int:
    """Size of a tensor in the source."""
    info = source.tensors[source_name(source, row)]
    return torch.Size(info.shape).numel() * DTYPE_BYTES[info.dtype]


def _write_row(layout: Layout, source: Source, row: Row, shards: list[_ShardFile]) -> Any:
    """Convert one whole tensor, lay each rank's slices down, and return the sums for the manifest."""
    whole = tuple(slice(0, length) for length in row.shape)
    weight = read_weight(layout, source, row, whole)
    sums = {}
    for name, tensor in weight_parts(row, weight).items():
        stored = shards[0].tensors[name]
        slices = [stored.index(shard.rank, shard.size) for shard in shards]
        sums[name] = {
            "shape": list(stored.shape),
            "dtype": stored.dtype,
            "shards": [
                {"slice": _plain(index), "sha256": shard.write(name, tensor[index])}
                for shard, index in zip(shards, slices, strict=True)
            ],
        }
    return sums


class _SummedSource:
    """A source that takes the sum of each whole tensor as its bytes pass."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._sums: dict[str, str] = {}
        self.path = source.path
        self.tensors = source.tensors

    def read(self, name: str, index: Index) -> Tensor:
        tensor = self._source.read(name, index)
        if tuple(tensor.shape) == self.tensors[name].shape:
            self._sums[name] = hashlib.sha256(_bytes(tensor)).hexdigest()
        return tensor

    def identity(self) -> dict[str, Any]:
        """The source's own, with the sums unless it brings some from where it was prepared."""
        return {"tensors": dict(sorted(self._sums.items())), **self._source.identity()}


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.contiguous().view(torch.uint8).numpy()
    return memoryview(array).cast("B")


class _ShardFile:
    """One rank's safetensors file; its header is known before its data, so tensors go in any order."""

    def __init__(self, layout: Layout, rank: int, size: int, directory: Path) -> None:
        self.rank, self.size = rank, size
        self.tensors = {tensor.name: tensor for tensor in layout.tensors}
        folder = directory / f"rank_{rank}"
        folder.mkdir()
        header, self._offsets, num_bytes = _header(layout.tensors, rank, size)
        self._fd = os.open(folder / SHARD_FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with _disk_errors(folder):
            os.pwrite(self._fd, header, 0)
            os.posix_fallocate(self._fd, 0, max(1, len(header) + num_bytes))

    def write(self, name: str, tensor: Tensor) -> str:
        """Put a tensor at its place; returns the sha256 of its bytes."""
        stored, data = self.tensors[name], _bytes(tensor)
        assert str(tensor.dtype) == f"torch.{stored.dtype}", (name, tensor.dtype, stored.dtype)
        assert len(data) == stored.num_bytes(self.rank, self.size), (name, tensor.shape)
        with _disk_errors(Path(name)):
            _pwrite_all(self._fd, data, self._offsets[name])
        return hashlib.sha256(data).hexdigest()

    def close(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)


def _header(
    tensors: tuple[StoredTensor, ...], rank: int, size: int
) -> tuple[bytes, dict[str, int], int]:
    """The file's header, the offset of each tensor in the file, and the bytes of data.

    Wide dtypes first, so that every tensor is aligned to its own size, as the library does.
    """
    ordered = sorted(tensors, key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))
    # Ranks often have shards of equal shapes; the metadata tells one that was swapped.
    metadata = {"format": "pt", "rank": str(rank), "tp": str(size)}
    entries: dict[str, Any] = {"__metadata__": metadata}
    starts, position = {}, 0
    for tensor in ordered:
        end = position + tensor.num_bytes(rank, size)
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(index_shape(tensor.index(rank, size))),
            "data_offsets": [position, end],
        }
        starts[tensor.name], position = position, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    offsets = {name: base + start for name, start in starts.items()}
    return len(text).to_bytes(8, "little") + text, offsets, position


def _pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def _disk_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{where} could not be written ({reason(error)}); nothing was left behind, "
            "free some space or choose another `output`."
        ) from error


@contextmanager
def _renamed_when_whole(output: Path) -> Iterator[Path]:
    """A directory beside `output` that gets its name at the end, or is removed on an error."""
    if os.path.lexists(output):
        raise CheckpointError(f"`output` {output} exists already; choose another or remove it.")
    directory = output.with_name(f".{output.name}.partial-{os.getpid()}")
    made = [path for path in output.parents if not path.exists()]
    try:
        with _disk_errors(output):
            directory.mkdir(parents=True)
            yield directory
            _sync_tree(directory)
            os.rename(directory, output)
            _sync(output.parent)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def _sync_tree(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _copy_files(source: Path, directory: Path, overrides: Mapping[str, Any]) -> None:
    for name in COPIED_FILES:
        if (source / name).exists():
            check_regular(source / name)
            shutil.copyfile(source / name, directory / name)
    config = read_json_object(source / "config.json")
    if (replaced := override_config(config, overrides)) != config:
        text = json.dumps(replaced, indent=2, ensure_ascii=False)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def _manifest(layout: Layout, source: Source, size: int, sums: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: part for row in layout.table for name, part in sums[row].items()}
    return {
        "format": "shardrun",
        "version": FORMAT_VERSION,
        "complete": True,
        "mesh": {"tp": size},
        "vocab_emb_dp": layout.vocab_emb_dp,
        "scheme": layout.scheme.to_dict(),
        "source": source.identity(),
        "tensors": tensors,
    }


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest, indent=1)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _plain(index: Index) -> list[list[int]]:
    return [[cut.start, cut.stop] for cut in index]
