"""SharedMemoryGroup: the ranks of one host, over memory that they all have mapped.

The group counts turns. In a turn a rank may write its slot, says that it has reached the turn, and
may then read the slots of ranks that have reached it too. There are two sets of slots, used in
turn: a rank writes its slot in turn t once all have reached t-1, and so have read what it wrote in
t-2. A small all-reduce is one turn: every rank adds up all slots. A large one goes in pieces of a
slot, and every rank adds up its part of a piece for all: in turn t a rank writes piece t, adds up
its part of piece t-1, and copies the sum of piece t-2. Both add in rank order, each element
for itself, so they give the same bits, on every rank and in every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from parallel.collectives.segment import Segment
from parallel.collectives.signals import AbsentError, Patience, Signals
from parallel.group import ProcessGroup, reduce_into

_PAGE_BYTES = 4096
# A rank's slot: this many bytes, less where many ranks would make the segment large.
_LARGEST_SLOT_BYTES = 1 << 19
_ALL_SLOTS_BYTES = 1 << 22
_ALL_MAIL_BYTES = 1 << 17
# From here on dividing the sum among the ranks saves more than the second turn costs; measured
# with scripts/bench_collectives.py --switch.
ONE_SHOT_BYTES = 1 << 16
_PART_UNIT = 64


@dataclass(frozen=True)
class SegmentLayout:
    """Where what lies in a segment of `size` ranks: signals, slots (twice), sums (twice), mail."""

    size: int

    @property
    def slot_bytes(self) -> int:
        share = _ALL_SLOTS_BYTES // self.size // _PAGE_BYTES * _PAGE_BYTES
        return min(_LARGEST_SLOT_BYTES, max(share, ONE_SHOT_BYTES))

    @property
    def mail_bytes(self) -> int:
        return max(_PAGE_BYTES, _ALL_MAIL_BYTES // self.size // _PAGE_BYTES * _PAGE_BYTES)

    @property
    def signal_bytes(self) -> int:
        return -(-Signals.num_bytes(self.size) // _PAGE_BYTES) * _PAGE_BYTES

    @property
    def num_bytes(self) -> int:
        return self.mail(self.size, 0).start

    def slot(self, half: int, rank: int) -> slice:
        start = self.signal_bytes + (half * self.size + rank) * self.slot_bytes
        return slice(start, start + self.slot_bytes)

    def sums(self, half: int) -> slice:
        return self.slot(2, half)

    def mail(self, source: int, destination: int) -> slice:
        place = source * self.size + destination
        start = self.slot(2, 2).start + place * self.mail_bytes
        return slice(start, start + self.mail_bytes)


@dataclass(frozen=True)
class _Views:
    """One half of the slots, as tensors of the dtype and length of what is reduced.

    Attributes:
        slots: one a rank.
        my_parts: this rank's part of each slot, which it adds up for all.
        my_sum: where it writes the result.
        sums: the results of all.
    """

    slots: list[Tensor]
    my_parts: list[Tensor]
    my_sum: Tensor
    sums: Tensor


class SharedMemoryGroup(ProcessGroup):
    """The ranks of one host, or those of one host of a larger job.

    Args:
        segment: of `SegmentLayout(size).num_bytes` bytes; all ranks have mapped it.
        timeout_s: deadline of one wait.
        is_alive: whether the process of a rank, by its name, still runs.
        is_crowded: cores are fewer than those who want one.
        names: what messages call each rank; default: its number in this group.
    """

    breaks = AbsentError

    def __init__(
        self,
        rank: int,
        size: int,
        segment: Segment,
        timeout_s: float,
        is_alive: Callable[[int], bool],
        describe_failure: Callable[[str], str] = str,
        *,
        is_crowded: bool = False,
        names: Sequence[int] | None = None,
    ) -> None:
        super().__init__(rank, size, describe_failure)
        self._layout = SegmentLayout(size)
        signals = memoryview(segment.memory)[: self._layout.signal_bytes]
        patience = Patience.of(is_crowded)
        self._signals = Signals(signals, names or range(size), timeout_s, is_alive, patience)
        self._others = [other for other in range(size) if other != rank]
        self._my_cell = self._signals.turn_cell(rank)
        self._other_cells = [self._signals.turn_cell(other) for other in self._others]
        self._mail: Counter[int] = Counter()  # pieces sent and received, by signal
        self._turn = 0
        self._all_reached = 0  # a turn that all ranks are known to have reached
        self._views = lru_cache(maxsize=256)(self._make_views)
        self._slot = lru_cache(maxsize=256)(self._make_slot)
        with torch.inference_mode(False):
            self._bytes = torch.frombuffer(segment.memory, dtype=torch.uint8)

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        x = x.contiguous()
        flat = x.view(-1)
        if flat.nbytes <= ONE_SHOT_BYTES:
            self._reduce_at_once(flat, op)
        else:
            self._reduce_in_parts(flat, op)
        return x

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        parts = self._empty_parts(x)
        parts[self.rank].copy_(x)
        self._move(x, {other: parts[other] for other in self._others})
        return parts

    def _gather(self, x: Tensor) -> list[Tensor] | None:
        if self.rank != 0:
            self._move(x, {})
            return None
        parts = self._empty_parts(x)
        parts[0].copy_(x)
        self._move(None, {other: parts[other] for other in self._others})
        return parts

    def _broadcast(self, x: Tensor, source: int) -> Tensor:
        x = x.contiguous()
        if self.rank == source:
            self._move(x, {})
        else:
            self._move(None, {source: x})
        return x

    def _barrier(self) -> None:
        self._start_turn()
        self._meet()

    def _send(self, x: Tensor, destination: int) -> None:
        sent = self._signals.sent_cell(self.rank, destination)
        received = [self._signals.received_cell(self.rank, destination)]
        box = self._bytes[self._layout.mail(self.rank, destination)]
        for piece in _bytes_of(x.contiguous()).split(box.numel()):
            self._signals.wait_for(received, self._mail[sent])
            box[: piece.numel()].copy_(piece)
            self._mail[sent] += 1
            self._signals.raise_to(sent, self._mail[sent])

    def _recv(self, x: Tensor, source: int) -> Tensor:
        sent = [self._signals.sent_cell(source, self.rank)]
        received = self._signals.received_cell(source, self.rank)
        box = self._bytes[self._layout.mail(source, self.rank)]
        whole = x.contiguous()
        for piece in _bytes_of(whole).split(box.numel()):
            self._mail[received] += 1
            self._signals.wait_for(sent, self._mail[received])
            piece.copy_(box[: piece.numel()])
            self._signals.raise_to(received, self._mail[received])
        return x if whole is x else x.copy_(whole)

    def _reduce_at_once(self, x: Tensor, op: str) -> None:
        """One turn: every rank adds up everything."""
        half = self._start_turn()
        slots = self._views(half, x.dtype, x.numel()).slots
        slots[self.rank].copy_(x)
        self._meet()
        reduce_into(x, slots, op)

    def _reduce_in_parts(self, x: Tensor, op: str) -> None:
        """A turn a piece and two more: every rank adds up its part of each piece."""
        pieces = x.split(self._layout.slot_bytes // x.element_size())
        for step in range(len(pieces) + 2):
            if step >= 2:
                done = pieces[step - 2]
                done.copy_(self._views((self._turn - 1) % 2, x.dtype, done.numel()).sums)
            if step <= len(pieces):
                self._start_turn()
                self._work_on(pieces, step, op)
                self._meet()

    def _work_on(self, pieces: Sequence[Tensor], step: int, op: str) -> None:
        """What this rank writes in a turn: its slot of one piece, its sum of the one before."""
        if step < len(pieces):
            piece = pieces[step]
            self._views(self._turn % 2, piece.dtype, piece.numel()).slots[self.rank].copy_(piece)
        if step >= 1:
            piece = pieces[step - 1]
            views = self._views((self._turn - 1) % 2, piece.dtype, piece.numel())
            reduce_into(views.my_sum, views.my_parts, op)

    def _move(self, mine: Tensor | None, theirs: dict[int, Tensor]) -> None:
        """Lay down this rank's bytes, if others want them, and pick up those of others.

        Args:
            theirs: contiguous tensors to fill, by the rank whose bytes they take.
        """
        source = None if mine is None else _bytes_of(mine.contiguous())
        sinks = {rank: _bytes_of(tensor) for rank, tensor in theirs.items()}
        cells = [self._signals.turn_cell(rank) for rank in sinks]
        num_bytes = next(item for item in (source, *sinks.values()) if item is not None).numel()
        for start in range(0, num_bytes, self._layout.slot_bytes):
            piece = slice(start, min(start + self._layout.slot_bytes, num_bytes))
            half = self._start_turn(writes=source is not None)
            if source is not None:
                self._slot(half, self.rank, piece.stop - start).copy_(source[piece])
            self._signals.raise_to(self._my_cell, self._turn)
            self._signals.wait_for(cells, self._turn)
            for rank, sink in sinks.items():
                sink[piece].copy_(self._slot(half, rank, piece.stop - start))

    def _start_turn(self, writes: bool = True) -> int:
        """Which half of the slots this turn is for; whoever writes waits until it is read."""
        self._turn += 1
        if writes and self._all_reached < self._turn - 1:
            self._signals.wait_for(self._other_cells, self._turn - 1)
        return self._turn % 2

    def _meet(self) -> None:
        """Say that this rank has reached the turn, and wait until all have."""
        self._signals.raise_to(self._my_cell, self._turn)
        self._signals.wait_for(self._other_cells, self._turn)
        self._all_reached = self._turn

    def _empty_parts(self, x: Tensor) -> list[Tensor]:
        return [torch.empty(x.shape, dtype=x.dtype) for _ in range(self.size)]

    # Views are made outside of inference mode: those made inside could not be written outside.
    @torch.inference_mode(False)
    def _make_slot(self, half: int, rank: int, num_bytes: int) -> Tensor:
        return self._bytes[self._layout.slot(half, rank)][:num_bytes]

    @torch.inference_mode(False)
    def _make_views(self, half: int, dtype: torch.dtype, length: int) -> _Views:
        def view(place: slice) -> Tensor:
            return self._bytes[place].view(dtype)[:length]

        slots = [view(self._layout.slot(half, rank)) for rank in range(self.size)]
        sums = view(self._layout.sums(half))
        # Whole cache lines: two ranks do not write into one.
        share = -(-length // (self.size * _PART_UNIT)) * _PART_UNIT
        mine = slice(share * self.rank, share * (self.rank + 1))
        return _Views(slots, [slot[mine] for slot in slots], sums[mine], sums)


def _bytes_of(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)
