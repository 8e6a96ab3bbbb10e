"""A source tensor becomes slices of the ranks' files, a block of rows at a time.

A block is read, quantized, cut, written and summed by one thread while it is in that core's cache, so
memory does not grow with the tensor, and a tensor's sums take its bytes in their order. Other threads
have other tensors: while one waits for the disk, the others compute.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from torch import Tensor

from parallel.checkpoint.layout import Layout, StoredTensor
from parallel.checkpoint.planned_file import PlannedFile, PlannedTensor, tensor_bytes
from parallel.checkpoint.readers.prepared import SHARD_FILE
from parallel.checkpoint.readers.shard_header import ShardHeader
from parallel.checkpoint.shard import read_weight, source_name, weight_parts
from parallel.checkpoint.source import DTYPE_BYTES, Source
from parallel.checkpoint.unfinished import Journal
from parallel.model.placements import Row
from parallel.placement import Index, index_shape

# Of the source, at a time: large enough for the disk, small enough for the caches.
BLOCK_BYTES = 16 << 20
_FLUSH_EVERY_S = 0.2
# Of the last tensors, for each thread: those of a layer or two.
_TAIL = 4
# A run of rows, [start, stop).
Run = tuple[int, int]


class ShardFile(PlannedFile):
    """One rank's safetensors file, new or begun by an earlier run."""

    def __init__(self, layout: Layout, rank: int, size: int, directory: Path) -> None:
        self.rank = rank
        folder = directory / f"rank_{rank}"
        folder.mkdir(exist_ok=True)
        entries = [
            PlannedTensor(item.name, index_shape(item.index(rank, size)), item.dtype)
            for item in layout.tensors
        ]
        # Ranks often have shards of equal shapes; the header tells one that was swapped.
        header = ShardHeader(rank, size, layout.scheme, layout.vocab_emb_dp)
        super().__init__(folder / SHARD_FILE, entries, header.to_metadata())


class Conversion:
    """What all threads of a prepare share.

    Args:
        size: the ranks that the model is cut for; `shards` may be some of them.
        journal: tells what an earlier run has done, and is told what this one does.
    """

    def __init__(
        self,
        layout: Layout,
        source: Source,
        size: int,
        shards: Sequence[ShardFile],
        journal: Journal,
    ) -> None:
        self._layout, self._source, self._size = layout, source, size
        self._ranks = [shard.rank for shard in shards]
        self._shards, self._journal = shards, journal
        # A prepared source has those of the checkpoint that it was made from.
        self._takes_sums = "tensors" not in source.identity()
        self._is_stopped = Event()

    def run(
        self, jobs: Mapping[str, int], num_threads: int, on_bytes: Callable[[int], object]
    ) -> None:
        """Convert source tensors; an error or a signal ends all threads soon.

        Args:
            jobs: their names, and the bytes that are read of each.
        """
        rows = rows_by_source(self._layout, self._source)
        # One more, which flushes.
        pool = ThreadPoolExecutor(num_threads + 1)
        flushing = pool.submit(self._flush)
        try:
            names = work_order(jobs, _TAIL * num_threads)
            for name in pool.map(lambda name: self._convert(name, rows[name]), names):
                on_bytes(jobs[name])
        finally:
            self._is_stopped.set()
            pool.shutdown(cancel_futures=True)
        flushing.result()

    def _flush(self) -> None:
        """Keep the disk writing meanwhile: what waits until the end is written while nobody computes."""
        while not self._is_stopped.wait(_FLUSH_EVERY_S):
            for shard in self._shards:
                shard.flush()

    def _convert(self, name: str, rows: Sequence[Row]) -> str:
        if self._is_intact(self._journal.records.get(name), rows):
            return name
        passing = _PassingSource(self._source, name, takes_sum=self._takes_sums)
        written = _Slices(self._shards)
        for first, last in self._blocks(rows):
            for row in rows:
                index = (slice(first, last), *(slice(0, length) for length in row.shape[1:]))
                weight = read_weight(self._layout, passing, row, index)
                parts = weight_parts(row, weight)
                for stored in self._layout.parts[row.name]:
                    cuts = [stored.index(shard.rank, self._size) for shard in self._shards]
                    written.put(stored, cuts, parts[stored.name], first)
            if self._is_stopped.is_set():
                return name
        self._journal.add(name, {"source": passing.sum(), "slices": written.sums()})
        return name

    def _is_intact(self, record: Any, rows: Sequence[Row]) -> bool:
        """Whether the journal speaks of all that is made of these rows, and the files hold it."""
        if record is None:
            return False
        shards = {str(shard.rank): shard for shard in self._shards}
        parts = {stored.name for row in rows for stored in self._layout.parts[row.name]}
        if record["slices"].keys() != parts:
            return False
        if any(by_rank.keys() != shards.keys() for by_rank in record["slices"].values()):
            return False
        return all(
            shards[rank].stored_sum(name) == found
            for name, by_rank in record["slices"].items()
            for rank, found in by_rank.items()
        )

    def _blocks(self, rows: Sequence[Row]) -> Iterator[Run]:
        """The rows that some rank here needs, a few megabytes at a time."""
        size = max(1, num_bytes(self._source, source_name(self._source, rows[0])))
        step = max(1, BLOCK_BYTES * rows[0].shape[0] // size)
        # A tensor of one dimension is one block: its parts are no rows.
        step = step if len(rows[0].shape) > 1 else rows[0].shape[0]
        for start, stop in needed_rows(rows, self._ranks, self._size):
            for first in range(start, stop, step):
                yield first, min(first + step, stop)


class _PassingSource:
    """A source that takes the sum of one tensor as its rows pass, and keeps the last of them: a tied
    head asks for what the embedding has just been made of.
    """

    def __init__(self, source: Source, name: str, *, takes_sum: bool) -> None:
        self._source, self._name = source, name
        self.path, self.tensors = source.path, source.tensors
        self._sum = hashlib.sha256() if takes_sum else None
        self._num_rows = 0
        self._last: tuple[Index, Tensor] | None = None

    def read(self, name: str, index: Index) -> Tensor:
        if name != self._name:
            return self._source.read(name, index)
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        tensor = self._source.read(name, index)
        if self._sum is not None and self._num_rows == index[0].start:
            self._sum.update(tensor_bytes(tensor))
            self._num_rows = index[0].stop
        self._last = index, tensor
        return tensor

    def identity(self) -> dict[str, Any]:
        return self._source.identity()

    def sum(self) -> str | None:
        """The sha256 of the whole tensor; None: not all of it was read, or nobody wants to know."""
        is_whole = self._num_rows == self.tensors[self._name].shape[0]
        return self._sum.hexdigest() if self._sum is not None and is_whole else None


class _Slices:
    """Writes the ranks' slices of one source tensor, and takes their sums."""

    def __init__(self, shards: Sequence[ShardFile]) -> None:
        self._shards = shards
        # Ranks with the same slice, as of a norm, share its sum.
        self._sums: dict[tuple[str, str], Any] = {}
        self._keys: dict[str, dict[str, tuple[str, str]]] = {}

    def put(self, stored: StoredTensor, cuts: Sequence[Index], rows: Tensor, first: int) -> None:
        """Write what each rank has of some rows of a tensor.

        Args:
            cuts: the slice of the tensor that each shard holds.
            rows: the tensor's, from `first` on.
        """
        if stored.is_whole and stored.name in self._keys:
            return  # it stands beside each block of rows, whole
        first = 0 if stored.is_whole else first
        summed: set[tuple[str, str]] = set()
        for shard, cut in zip(self._shards, cuts, strict=True):
            key = stored.name, str(cut)
            total = self._sums.setdefault(key, hashlib.sha256())
            self._keys.setdefault(stored.name, {})[str(shard.rank)] = key
            start, stop = max(cut[0].start, first), min(cut[0].stop, first + len(rows))
            if start >= stop:
                continue
            local = rows[(slice(start - first, stop - first), *cut[1:])]
            data = shard.write(stored.name, local, start - cut[0].start)
            if key not in summed:
                total.update(data)
                summed.add(key)

    def sums(self) -> dict[str, dict[str, str]]:
        """The sha256 of each stored tensor's slice, by rank."""
        return {
            name: {rank: self._sums[key].hexdigest() for rank, key in by_rank.items()}
            for name, by_rank in self._keys.items()
        }


def rows_by_source(layout: Layout, source: Source) -> dict[str, list[Row]]:
    """The rows that are made of each source tensor, in the order of the source's files: a tied head
    is made of the embedding, which is read once."""
    rows: dict[str, list[Row]] = {}
    for row in layout.table.values():
        rows.setdefault(source_name(source, row), []).append(row)
    order = {name: at for at, name in enumerate(source.tensors)}
    return dict(sorted(rows.items(), key=lambda item: order[item[0]]))


def work_order(jobs: Mapping[str, int], tail: int) -> list[str]:
    """The names in their order, but of the last `tail` the largest first: an embedding or head at the
    very end would keep one thread while the others have nothing left."""
    names = list(jobs)
    cut = max(0, len(names) - tail)
    return names[:cut] + sorted(names[cut:], key=lambda name: -jobs[name])


def num_bytes(source: Source, name: str) -> int:
    """Size of a tensor in the source."""
    info = source.tensors[name]
    return math.prod(info.shape) * DTYPE_BYTES[info.dtype]


def needed_rows(rows: Sequence[Row], ranks: Iterable[int], size: int) -> list[Run]:
    """The rows of one source tensor that some of `ranks` need, in order, apart from each other."""
    cuts = sorted(
        (cut.start, cut.stop) for row in rows for rank in ranks for cut in row.index(rank, size)[:1]
    )
    runs: list[Run] = []
    for start, stop in cuts:
        if runs and start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
        else:
            runs.append((start, stop))
    return runs


def read_bytes(layout: Layout, source: Source, size: int, ranks: Sequence[int]) -> dict[str, int]:
    """What is read of each source tensor for the shards of `ranks`."""
    return {
        name: num_bytes(source, name)
        * sum(stop - start for start, stop in needed_rows(rows, ranks, size))
        // max(1, rows[0].shape[0])
        for name, rows in rows_by_source(layout, source).items()
    }
