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
from collections.abc import Callable, Iterator, Sequence
from ctypes import memmove
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from parallel.collectives.compiled import KINDS, CompiledAllReduce, Progress, library
from parallel.collectives.segment import Segment
from parallel.collectives.signals import CELL_BYTES, AbsentError, Patience, Presence, Signals
from parallel.group import ProcessGroup, reduce_into

_PAGE_BYTES = 4096
# A rank's slot: large, as every turn waits for the slowest; less where ranks are many.
_LARGEST_SLOT_BYTES = 1 << 21
_ALL_SLOTS_BYTES = 1 << 23
_ALL_MAIL_BYTES = 1 << 17
# Above this, dividing the sum among the ranks saves more than two more turns cost; measured
# with scripts/bench_collectives.py --switch.
ONE_SHOT_BYTES = 1 << 17
# A part is whole cache lines: two ranks do not write into one.
_PART_UNIT = 64
# torch adds up so many numbers on the thread that asks. Its other threads would cost more than they
# save, and far more where cores are shared: they meet at a barrier after each operation.
_ONE_THREAD_LENGTH = 1 << 15


# Where a sum goes, and what is added up, in rank order.
_Part = tuple[Tensor, Sequence[Tensor]]


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


class SharedMemoryGroup(ProcessGroup):
    """The ranks of one host, or those of one host of a larger job.

    Args:
        segment: of `SegmentLayout(size).num_bytes` bytes; all ranks have mapped it.
        timeout_s: deadline of one wait.
        presence: of the processes of the ranks, by their names.
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
        presence: Presence,
        describe_failure: Callable[[str], str] = str,
        *,
        is_crowded: bool = False,
        names: Sequence[int] | None = None,
    ) -> None:
        super().__init__(rank, size, describe_failure)
        self._layout = SegmentLayout(size)
        signals = memoryview(segment.memory)[: self._layout.signal_bytes]
        patience = Patience.of(is_crowded)
        self._signals = Signals(signals, names or range(size), timeout_s, presence, patience)
        self._others = [other for other in range(size) if other != rank]
        self._my_cell = self._signals.turn_cell(rank)
        self._other_cells = [self._signals.turn_cell(other) for other in self._others]
        self._mail: Counter[int] = Counter()  # pieces sent and received, by signal
        self._progress = Progress()
        self._slots = lru_cache(maxsize=256)(self._make_slots)
        self._parts = lru_cache(maxsize=256)(self._make_parts)
        with torch.inference_mode(False):
            self._bytes = torch.frombuffer(segment.memory, dtype=torch.uint8)
        self._address = self._bytes.data_ptr()
        self._my_slots = [self._slot_address(half, rank) for half in (0, 1)]
        self._compiled = self._open_compiled(patience)

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        x = x.contiguous()
        if x.nbytes <= ONE_SHOT_BYTES and x.numel() <= _ONE_THREAD_LENGTH:
            self._reduce_at_once(x, op)
        else:
            self._reduce_in_parts(x.view(-1), op)
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
        box = self._address + self._layout.mail(self.rank, destination).start
        x = x.contiguous()
        for start, num_bytes in _pieces(x.nbytes, self._layout.mail_bytes):
            self._signals.wait_for(received, self._mail[sent])
            memmove(box, x.data_ptr() + start, num_bytes)
            self._mail[sent] += 1
            self._signals.raise_to(sent, self._mail[sent])

    def _recv(self, x: Tensor, source: int) -> Tensor:
        sent = [self._signals.sent_cell(source, self.rank)]
        received = self._signals.received_cell(source, self.rank)
        box = self._address + self._layout.mail(source, self.rank).start
        found = x.contiguous()
        for start, num_bytes in _pieces(x.nbytes, self._layout.mail_bytes):
            self._mail[received] += 1
            self._signals.wait_for(sent, self._mail[received])
            memmove(found.data_ptr() + start, box, num_bytes)
            self._signals.raise_to(received, self._mail[received])
        return x if found is x else x.copy_(found)

    def _reduce_at_once(self, x: Tensor, op: str) -> None:
        """One turn: every rank adds up everything."""
        if self._compiled is not None and (x.dtype, op) in KINDS:
            self._compiled(x, op)
            return
        half = self._start_turn()
        memmove(self._my_slots[half], x.data_ptr(), x.nbytes)
        self._meet()
        reduce_into(x, self._slots(half, x.dtype, x.shape), op)

    def _reduce_in_parts(self, x: Tensor, op: str) -> None:
        """A turn a piece and two more: every rank adds up its part of each piece."""
        pieces = x.split(self._layout.slot_bytes // x.element_size())
        for step in range(len(pieces) + 2):
            if step >= 2:
                done = pieces[step - 2]
                memmove(done.data_ptr(), self._sums_address((self._turn - 1) % 2), done.nbytes)
            if step <= len(pieces):
                self._start_turn()
                self._work_on(pieces, step, op)
                self._meet()

    def _work_on(self, pieces: Sequence[Tensor], step: int, op: str) -> None:
        """What this rank writes in a turn: its slot of one piece, its sum of the one before."""
        if step < len(pieces):
            piece = pieces[step]
            memmove(self._my_slots[self._turn % 2], piece.data_ptr(), piece.nbytes)
        if step >= 1:
            piece = pieces[step - 1]
            for total, parts in self._parts((self._turn - 1) % 2, piece.dtype, piece.numel()):
                reduce_into(total, parts, op)

    def _move(self, mine: Tensor | None, theirs: dict[int, Tensor]) -> None:
        """Lay down this rank's bytes, if others want them, and pick up those of others.

        Args:
            theirs: contiguous tensors to fill, by the rank whose bytes they take.
        """
        mine = None if mine is None else mine.contiguous()
        cells = [self._signals.turn_cell(rank) for rank in theirs]
        total = next(item for item in (mine, *theirs.values()) if item is not None).nbytes
        for start, num_bytes in _pieces(total, self._layout.slot_bytes):
            half = self._start_turn(writes=mine is not None)
            if mine is not None:
                memmove(self._my_slots[half], mine.data_ptr() + start, num_bytes)
            self._signals.raise_to(self._my_cell, self._turn)
            self._signals.wait_for(cells, self._turn)
            for rank, sink in theirs.items():
                memmove(sink.data_ptr() + start, self._slot_address(half, rank), num_bytes)

    def _start_turn(self, writes: bool = True) -> int:
        """Which half of the slots this turn is for; whoever writes waits until it is read."""
        self._progress.turn += 1
        if writes and self._progress.all_reached < self._turn - 1:
            self._signals.wait_for(self._other_cells, self._turn - 1)
        return self._turn % 2

    def _meet(self) -> None:
        """Say that this rank has reached the turn, and wait until all have."""
        self._signals.raise_to(self._my_cell, self._turn)
        self._signals.wait_for(self._other_cells, self._turn)
        self._progress.all_reached = self._turn

    @property
    def _turn(self) -> int:
        return self._progress.turn

    def _empty_parts(self, x: Tensor) -> list[Tensor]:
        return [torch.empty(x.shape, dtype=x.dtype) for _ in range(self.size)]

    def _open_compiled(self, patience: Patience) -> CompiledAllReduce | None:
        found = library()
        if found is None:
            return None
        return CompiledAllReduce(
            found,
            self.rank,
            self._progress,
            self._address,
            CELL_BYTES,
            [self._slot_address(half, rank) for half in (0, 1) for rank in range(self.size)],
            patience.spin_s,
            patience.yield_s,
            self._wait_for_all,
            lambda: self.counts.update(all_reduce=1),
            self._note,
        )

    def _wait_for_all(self) -> None:
        """Until a call in C may go on; also inside a program, where no collective is entered."""
        with self._naming_the_culprit("all_reduce"):
            self._signals.wait_for(self._other_cells, self._progress.awaited)

    def _slot_address(self, half: int, rank: int) -> int:
        return self._address + self._layout.slot(half, rank).start

    def _sums_address(self, half: int) -> int:
        return self._address + self._layout.sums(half).start

    # Views are made outside of inference mode: those made inside could not be written outside.
    @torch.inference_mode(False)
    def _make_slots(self, half: int, dtype: torch.dtype, shape: torch.Size) -> list[Tensor]:
        """What the ranks have laid down in one half, as tensors."""
        places = (self._layout.slot(half, rank) for rank in range(self.size))
        return [self._bytes[place].view(dtype)[: shape.numel()].view(shape) for place in places]

    @torch.inference_mode(False)
    def _make_parts(self, half: int, dtype: torch.dtype, length: int) -> list[_Part]:
        """This rank's part of a piece, cut into what one thread of torch adds up."""
        share = -(-length // (self.size * _PART_UNIT)) * _PART_UNIT
        first, last = (min(share * rank, length) for rank in (self.rank, self.rank + 1))
        places = [self._layout.slot(half, rank) for rank in range(self.size)]
        sums, *slots = (
            self._bytes[place].view(dtype)[first:last].split(_ONE_THREAD_LENGTH)
            for place in (self._layout.sums(half), *places)
        )
        return list(zip(sums, zip(*slots, strict=True), strict=True))


def _pieces(num_bytes: int, most: int) -> Iterator[tuple[int, int]]:
    """Start and length of each piece of so many bytes."""
    for start in range(0, num_bytes, most):
        yield start, min(most, num_bytes - start)
