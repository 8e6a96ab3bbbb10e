"""Load one rank's decoder: read, quantize or convert, join, pack, and free, a tensor a thread.

Nothing but the packed weight of a parameter outlives its turn, so anonymous memory stays near the
weights and what the threads have in hand.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.checkpoint.layout import Layout
from parallel.checkpoint.shard import check_inputs, read_stored
from parallel.checkpoint.source import Source
from parallel.group import Group
from parallel.model.build import build_decoder
from parallel.model.decoder import Decoder
from parallel.model.parameters import Parameter, parameters
from parallel.model.placements import EMBEDDING, HEAD, Row
from parallel.placement import Index, Split, index_shape
from quant.kernels import Kernel, make_ready
from quant.kernels.reference import ReferenceKernel
from quant.weight import ReadyWeight, StoredWeight

# Bytes of a page: one of each is touched, so that reading a mapped file counts as reading.
PAGE_BYTES = 4096


@dataclass
class LoadTimings:
    """Where the time of loading went, and how much was loaded.

    Attributes:
        wall_s: from the first byte to the decoder.
        read_s, convert_s, pack_s: seconds of the threads, added up: reading the source; quantizing
            or converting to the compute dtype; packing for the kernel, or joining.
        num_threads: parameters that were worked on at a time.
        weight_bytes: bytes of the weights as they lie in memory.
        disk_bytes: what the disk was read for this process, by the kernel's count; the rest was in the
            page cache, where ranks of a host find what another has read.
    """

    wall_s: float = 0.0
    read_s: float = 0.0
    convert_s: float = 0.0
    pack_s: float = 0.0
    num_threads: int = 1
    weight_bytes: int = 0
    disk_bytes: int = 0


def load_decoder(
    layout: Layout,
    source: Source,
    group: Group,
    dtype: torch.dtype,
    device: torch.device,
    *,
    max_length: int,
    kernel: Kernel | None = None,
    exact_sums: bool | None = None,
    num_threads: int | None = None,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> tuple[Decoder, LoadTimings]:
    """This rank's part of a model.

    Args:
        dtype: the compute dtype; every float but the scales is converted to it.
        max_length: the longest sequence in tokens.
        kernel: packs the weights of products; ReferenceKernel if None.
        exact_sums: row-parallel products of quantized weights are added up as integers, so that
            every number of ranks gives the same bits; None: where activations are int8.
        num_threads: parameters that are worked on at a time; torch's own number if None.
        on_bytes: told, by the calling thread, the bytes of each parameter that is in its place.

    Raises:
        CheckpointError: a weight that must be quantized holds an infinity or a NaN; static scales
            that are missing, or that differ between products of one input.
    """
    start, before = time.perf_counter(), _disk_bytes()
    loader = _Loader(layout, source, group, dtype, device, kernel or ReferenceKernel())
    timings = LoadTimings(num_threads=num_threads or torch.get_num_threads())
    # The largest first: no thread is left alone with one at the end.
    wanted = sorted(parameters(layout.table), key=loader.num_entries, reverse=True)
    weights: dict[str, ReadyWeight] = {}
    for loaded in _in_threads(loader, wanted, timings.num_threads):
        weights[loaded.name] = loaded.weight
        timings.read_s += loaded.read_s
        timings.convert_s += loaded.convert_s
        timings.pack_s += loaded.pack_s
        on_bytes(loaded.weight.nbytes)
    timings.weight_bytes = sum(weight.nbytes for weight in weights.values())
    if HEAD not in weights:
        weights[HEAD] = loader.tied_head(weights[EMBEDDING])
        timings.weight_bytes += 0 if isinstance(weights[HEAD], Tensor) else weights[HEAD].nbytes
    _return_freed_memory()
    decoder = build_decoder(
        layout.config,
        layout.table,
        weights,
        group,
        max_length,
        kv_granularity=layout.scheme.kv_granularity,
        exact_sums=exact_sums,
    )
    timings.wall_s = time.perf_counter() - start
    timings.disk_bytes = _disk_bytes() - before
    return decoder, timings


@dataclass(frozen=True)
class _Loaded:
    """One parameter in its place, and the seconds that its thread spent on it."""

    name: str
    weight: ReadyWeight
    read_s: float
    convert_s: float
    pack_s: float


@dataclass(frozen=True)
class _Loader:
    layout: Layout
    source: Source
    group: Group
    dtype: torch.dtype
    device: torch.device
    kernel: Kernel

    def load(self, parameter: Parameter) -> _Loaded:
        """Read, convert, join and pack one parameter; what it was made from is freed on return."""
        timed = _TimedSource(self.source)
        start = time.perf_counter()
        parts = [
            self._place(
                row,
                read_stored(self.layout, timed, row, row.index(self.group.rank, self.group.size)),
            )
            for row in parameter.rows
        ]
        check_inputs(self.source, parameter.rows, parts)
        placed = time.perf_counter()
        weight = make_ready(self.kernel, *parts)
        packed = time.perf_counter()
        convert_s = placed - start - timed.read_s
        return _Loaded(parameter.name, weight, timed.read_s, convert_s, packed - placed)

    def num_entries(self, parameter: Parameter) -> int:
        """Of this rank's part of it."""
        indices = (row.index(self.group.rank, self.group.size) for row in parameter.rows)
        return sum(math.prod(index_shape(index)) for index in indices)

    def tied_head(self, embedding: ReadyWeight) -> ReadyWeight:
        """This rank's rows of the embedding: a view, also of a whole one, unless it is packed."""
        assert isinstance(embedding, Tensor), "the embedding is never quantized"
        shape = (self.layout.config.vocab_size, self.layout.config.hidden_size)
        if embedding.shape[0] == shape[0]:
            embedding = embedding[Split(0).index(shape, self.group.rank, self.group.size)[0]]
        return make_ready(self.kernel, embedding)

    def _place(self, row: Row, weight: StoredWeight | Tensor) -> StoredWeight | Tensor:
        if not isinstance(weight, Tensor) or row.is_kv_scale:
            return weight.to(self.device)
        return weight.to(device=self.device, dtype=self.dtype)


class _TimedSource:
    """A source that takes the time of its reads, the pages of mapped files among them."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.path = source.path
        self.tensors = source.tensors
        self.read_s = 0.0

    def read(self, name: str, index: Index) -> Tensor:
        start = time.perf_counter()
        tensor = self._source.read(name, index)
        tensor.reshape(-1).view(torch.uint8)[::PAGE_BYTES].sum()
        self.read_s += time.perf_counter() - start
        return tensor

    def identity(self) -> dict[str, Any]:
        return self._source.identity()


def _in_threads(
    loader: _Loader, wanted: Sequence[Parameter], num_threads: int
) -> Iterator[_Loaded]:
    """The loaded parameters in their order; an error ends the rest.

    Each thread works alone on its tensor: torch would give every one a team of threads of its own.
    """
    torch_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(loader.load, wanted)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)


def _disk_bytes() -> int:
    """What the disk has been read for this process so far; 0 where the kernel does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def _return_freed_memory() -> None:
    """glibc keeps what each thread has freed; returned, it does not stay beside the weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
