"""Group: the ranks of one tensor-parallel job, and the collectives between them.

A group is handed to whoever needs it; there is no global rank or size. Those of one process are
here:

    LoneGroup          one rank; every collective is the identity
    ThreadGroup        n ranks as n threads of this process, with real results
    SimulatedGroup     one rank of a larger job, alone: shapes and sizes are right, values are not

and those of one process a rank in parallel/collectives:

    SharedMemoryGroup  CPUs of one host
    TorchGroup         over torch.distributed: gloo on CPUs, NCCL on GPUs
    TwoLevelGroup      CPUs of several hosts: shared memory inside a host, gloo between them
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from parallel.errors import PeerError
from quant.kernels.native.recording import active

T = TypeVar("T")

_COMBINE: dict[str, Any] = {"sum": torch.add, "max": torch.maximum}


class Group(ABC):
    """Rank, size, and collectives. Every rank must call the same collectives in the same order.

    Attributes:
        rank: this rank, 0 <= rank < size.
        size: number of ranks.
        counts: how many times each collective was called, by name.
        calls: how many seconds each call took, in order, waiting for the others included, while
            somebody keeps a list here; None: nobody. On a GPU: how long it took to enqueue it.
    """

    def __init__(self, rank: int, size: int) -> None:
        assert 0 <= rank < size, (rank, size)
        self.rank = rank
        self.size = size
        self.counts: Counter[str] = Counter()
        self.calls: list[float] | None = None

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """The sum (or "max") of x over the ranks, the same bits on every rank. May overwrite x."""
        return self._counted("all_reduce", x.nbytes, lambda: self._all_reduce(x, op))

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, in rank order; the shapes must be equal."""
        return self._counted("all_gather", x.nbytes, lambda: self._all_gather(x))

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """Every rank's x in rank order on rank 0, None elsewhere; the shapes must be equal."""
        return self._counted("gather", x.nbytes, lambda: self._gather(x))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """This rank's part, along dim 0, of the sum of x over the ranks. May overwrite x."""
        assert x.shape[0] % self.size == 0, (x.shape, self.size)
        return self._counted("reduce_scatter", x.nbytes, lambda: self._reduce_scatter(x))

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """The source rank's x. May overwrite x."""
        return self._counted("broadcast", x.nbytes, lambda: self._broadcast(x, source))

    def send(self, x: Tensor, destination: int) -> None:
        self._counted("send", x.nbytes, lambda: self._send(x, destination))

    def recv(self, x: Tensor, source: int) -> Tensor:
        """Fill x with what the source rank sent."""
        return self._counted("recv", x.nbytes, lambda: self._recv(x, source))

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self._counted("barrier", 0, self._barrier)

    def _counted(self, name: str, num_bytes: int, collective: Callable[[], T]) -> T:
        self.counts[name] += 1
        recording = active()
        num_calls = recording.num_calls if recording else 0
        started_at = time.perf_counter()
        result = collective()
        self._note(time.perf_counter() - started_at)
        if recording and recording.num_calls == num_calls:
            recording.spoil(f"{name} of a {type(self).__name__}")
        return result

    def _note(self, seconds: float) -> None:
        if self.calls is not None:
            self.calls.append(seconds)

    @abstractmethod
    def _all_reduce(self, x: Tensor, op: str) -> Tensor: ...

    @abstractmethod
    def _all_gather(self, x: Tensor) -> list[Tensor]: ...

    @abstractmethod
    def _send(self, x: Tensor, destination: int) -> None: ...

    @abstractmethod
    def _recv(self, x: Tensor, source: int) -> Tensor: ...

    def _gather(self, x: Tensor) -> list[Tensor] | None:
        parts = self._all_gather(x)
        return parts if self.rank == 0 else None

    def _reduce_scatter(self, x: Tensor) -> Tensor:
        return self._all_reduce(x, "sum").chunk(self.size)[self.rank]

    def _broadcast(self, x: Tensor, source: int) -> Tensor:
        return self._all_gather(x)[source]

    def _barrier(self) -> None:
        self._all_gather(torch.zeros(1))


class LoneGroup(Group):
    """A group of one rank."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        return x

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        return [x]

    def _send(self, x: Tensor, destination: int) -> None:
        raise AssertionError("a group of one rank has nobody to send to")

    def _recv(self, x: Tensor, source: int) -> Tensor:
        raise AssertionError("a group of one rank has nobody to receive from")


class ProcessGroup(Group):
    """The ranks are processes, so that a collective can break because of another.

    Args:
        describe_failure: called when a collective breaks; names the rank that is gone or stuck.

    Raises:
        PeerError: from a collective, when another rank is gone or the deadline passes.
    """

    # What a collective that breaks raises.
    breaks: type[Exception] = RuntimeError

    def __init__(self, rank: int, size: int, describe_failure: Callable[[str], str]) -> None:
        super().__init__(rank, size)
        self._describe_failure = describe_failure

    def _counted(self, name: str, num_bytes: int, collective: Callable[[], T]) -> T:
        with self._naming_the_culprit(name):
            return super()._counted(name, num_bytes, collective)

    @contextmanager
    def _naming_the_culprit(self, name: str) -> Iterator[None]:
        try:
            yield
        except self.breaks as error:
            reason = str(error).partition("\n")[0][:200]
            call = f"{name} number {self.counts[name]} ({reason})"
            raise PeerError(self._describe_failure(call)) from error


class _Meeting:
    """Where the threads of a ThreadGroup lay down their tensors and pick up the others'.

    Two tables are used in turn: a rank that lays down for the exchange after next has passed the
    next barrier, and so everybody has picked up from this one.
    """

    def __init__(self, size: int, timeout_s: float) -> None:
        self.tables: tuple[dict[int, Tensor], ...] = ({}, {})
        self.mailboxes: dict[tuple[int, int], Tensor] = {}
        self.mail = threading.Condition()
        self.barrier = threading.Barrier(size, timeout=timeout_s)
        self.timeout_s = timeout_s

    def exchange(self, rank: int, turn: int, x: Tensor) -> list[Tensor]:
        table = self.tables[turn % 2]
        table[rank] = x.clone()
        self.barrier.wait()
        return [table[other].clone() for other in range(self.barrier.parties)]


class ThreadGroup(Group):
    """One of n ranks that live as threads of one process; sums are added in rank order.

    `ThreadGroup.run(n, function)` calls function(group) on n threads and returns the n results.
    """

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        super().__init__(rank, size)
        self._meeting = meeting
        self._turn = 0

    @staticmethod
    def run(size: int, function: Callable[[Group], T], timeout_s: float = 120) -> list[T]:
        """Call function(group) once for each rank; raises the first rank's exception that has one."""
        meeting = _Meeting(size, timeout_s)
        results: list[T | None] = [None] * size
        errors: list[BaseException] = []

        def run_rank(rank: int) -> None:
            try:
                results[rank] = function(ThreadGroup(rank, size, meeting))
            except BaseException as error:
                errors.append(error)
                meeting.barrier.abort()

        threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results  # type: ignore[return-value]  # no error: every rank has left a result

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        reduce_into(total := torch.empty_like(x), self._all_gather(x), op)
        return total

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        self._turn += 1
        return self._meeting.exchange(self.rank, self._turn, x)

    def _send(self, x: Tensor, destination: int) -> None:
        with self._meeting.mail:
            self._meeting.mailboxes[self.rank, destination] = x.clone()
            self._meeting.mail.notify_all()

    def _recv(self, x: Tensor, source: int) -> Tensor:
        boxes, key = self._meeting.mailboxes, (source, self.rank)
        with self._meeting.mail:
            if not self._meeting.mail.wait_for(lambda: key in boxes, self._meeting.timeout_s):
                raise PeerError(f"rank {source} sent nothing to rank {self.rank}")
            return x.copy_(boxes.pop(key))


def reduce_into(out: Tensor, parts: Sequence[Tensor], op: str) -> None:
    """The sum (or "max") of the parts, in their order; no part may overlap with out.

    16-bit numbers are added up in float32, and the sum is rounded once.
    """
    if op == "sum" and out.dtype in (torch.bfloat16, torch.float16):
        total = parts[0].float()
        for part in parts[1:]:
            total.add_(part)
        out.copy_(total)
        return
    combine = _COMBINE[op]
    first, *rest = parts
    if not rest:
        out.copy_(first)
    for part in rest:
        combine(first, part, out=out)
        first = out


class SimulatedGroup(Group):
    """One rank of a larger job without the others: every collective returns this rank's own values.

    For the memory, the plan and the speed of a rank; the text it produces means nothing.

    Args:
        cost_s: how many seconds a collective (by name, of so many bytes) would take. They are added
            to `calls`, and nobody waits for them; default: nothing.
    """

    def __init__(
        self, rank: int, size: int, cost_s: Callable[[str, int], float] | None = None
    ) -> None:
        super().__init__(rank, size)
        self._cost_s = cost_s

    def _counted(self, name: str, num_bytes: int, collective: Callable[[], T]) -> T:
        seconds = self._cost_s(name, num_bytes) if self._cost_s else 0.0

        def note() -> None:
            self.counts[name] += 1
            self._note(seconds)

        note()
        if (recording := active()) is not None:
            recording.after(note)
        return collective()

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        return x

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        return [x] * self.size

    def _send(self, x: Tensor, destination: int) -> None: ...

    def _recv(self, x: Tensor, source: int) -> Tensor:
        return x
