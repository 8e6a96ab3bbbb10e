"""The generation loop: prompts in, tokens out, sequences joining and leaving between steps.

Every rank runs the same loop. Rank 0 samples and decides who stops; the others are told by one
broadcast a step, so ranks cannot drift apart.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.generation.cache import KVCache
from parallel.generation.sampling import Sampling, next_token, prompt_generator
from parallel.model.decoder import Decoder, Segment, Step


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        index: its place among the prompts; with the seed it fixes the random numbers.
        prompt_ids: at least one token.
        max_new_tokens: at least one.
    """

    index: int
    prompt_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Completion:
    """What became of a prompt. `finish_reason` is "stop" (eos or a stop string) or "length"."""

    index: int
    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass
class Timings:
    """Seconds and tokens of the two phases, as rank 0 saw them."""

    prefill_s: float = 0.0
    prefill_tokens: int = 0
    prefill_steps: int = 0
    decode_s: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    first_token_at: float | None = None
    last_token_at: float | None = None


# Told each new token of a prompt, on rank 0 only; returns True to stop there.
OnToken = Callable[[int, int], bool]


@dataclass(eq=False)
class _Sequence:
    """A running prompt; its row of the cache is its place in the list of running ones."""

    request: Request
    random: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    stops: bool = False

    @property
    def length(self) -> int:
        """Positions whose keys are in the cache: the last generated token's are not yet."""
        return len(self.request.prompt_ids) + max(0, len(self.token_ids) - 1)

    def finish_reason(self) -> str | None:
        if self.stops:
            return "stop"
        return "length" if len(self.token_ids) == self.request.max_new_tokens else None

    def seen_ids(self) -> list[int]:
        return [*self.request.prompt_ids, *self.token_ids]


class GenerationLoop:
    """Runs requests through a decoder.

    Args:
        cache: as many rows as sequences may run at once; its length bounds prompt and answer.
        sampling, seed: how rank 0 chooses tokens.
        eos_ids: tokens that end an answer; empty to ignore them.
        prefill_chunk: most tokens of one prefill step; bounds its temporaries.
        on_token: told each token on rank 0.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        sampling: Sampling,
        *,
        seed: int = 0,
        eos_ids: Sequence[int] = (),
        prefill_chunk: int = 512,
        on_token: OnToken | None = None,
    ) -> None:
        self._decoder = decoder
        self._group = decoder.group
        self._cache = cache
        self._sampling = sampling
        self._seed = seed
        self._eos_ids = frozenset(eos_ids)
        self._prefill_chunk = prefill_chunk
        self._on_token = on_token or (lambda _index, _token: False)
        self._running: list[_Sequence] = []
        self.timings = Timings()

    def run(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Yield each completion as it ends, on every rank."""
        waiting = deque(requests)
        while waiting or self._running:
            if waiting and len(self._running) < self._cache.num_rows:
                yield from self._admit(waiting)
            if self._running:
                yield from self._decode()

    def _admit(self, waiting: deque[Request]) -> Iterator[Completion]:
        """Prefill as many prompts as there are free rows."""
        start = time.perf_counter()
        first_row = len(self._running)
        while waiting and len(self._running) < self._cache.num_rows:
            request = waiting.popleft()
            random = prompt_generator(self._seed, request.index)
            self._running.append(_Sequence(request, random))
        joined = self._running[first_row:]
        for chunk in _chunks(joined, first_row, self._prefill_chunk):
            logits = self._decoder(self._prefill_step(chunk), self._cache)
            self._take([piece.sequence for piece in chunk if piece.is_last], logits)
            self.timings.prefill_steps += 1
        self.timings.prefill_s += time.perf_counter() - start
        self.timings.prefill_tokens += sum(len(item.request.prompt_ids) for item in joined)
        yield from self._retire()

    def _decode(self) -> Iterator[Completion]:
        start = time.perf_counter()
        logits = self._decoder(self._decode_step(), self._cache)
        self._take(self._running, logits)
        self.timings.decode_s += time.perf_counter() - start
        self.timings.decode_tokens += len(self._running)
        self.timings.decode_steps += 1
        yield from self._retire()

    def _prefill_step(self, chunk: list[_Piece]) -> Step:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        select: list[int] = []
        segments: list[Segment] = []
        for piece in chunk:
            start = len(ids)
            ids += piece.sequence.request.prompt_ids[piece.start : piece.stop]
            positions += range(piece.start, piece.stop)
            base = piece.row * self._cache.max_length
            slots += range(base + piece.start, base + piece.stop)
            segments.append(Segment(piece.row, start, len(ids), piece.stop))
            if piece.is_last:
                select.append(len(ids) - 1)
        return self._step(ids, positions, slots, select, segments=tuple(segments))

    def _decode_step(self) -> Step:
        ids = [sequence.token_ids[-1] for sequence in self._running]
        positions = [sequence.length for sequence in self._running]
        rows = range(len(ids))
        slots = [row * self._cache.max_length + positions[row] for row in rows]
        return self._step(ids, positions, slots, list(rows), length=max(positions) + 1)

    def _step(
        self,
        ids: list[int],
        positions: list[int],
        slots: list[int],
        select: list[int],
        *,
        segments: tuple[Segment, ...] = (),
        length: int = 0,
    ) -> Step:
        device = self._decoder.device
        token_ids, places, targets, selected = (
            torch.tensor(values, dtype=torch.int64, device=device)
            for values in (ids, positions, slots, select)
        )
        return Step(token_ids, places, targets, selected, segments, length)

    def _take(self, sequences: list[_Sequence], logits_SV: Tensor | None) -> None:
        """Rank 0 chooses a token for each sequence and says which end here; all ranks note both."""
        if not sequences:
            return
        news_S2 = torch.zeros(len(sequences), 2, dtype=torch.int64, device=self._decoder.device)
        if logits_SV is not None:
            chosen = [self._choose(*pair) for pair in zip(sequences, logits_SV, strict=True)]
            news_S2 = torch.tensor(chosen, dtype=torch.int64, device=self._decoder.device)
            self.timings.last_token_at = time.time()
            self.timings.first_token_at = self.timings.first_token_at or self.timings.last_token_at
        news = self._group.broadcast(news_S2).tolist()
        for sequence, (token, stops) in zip(sequences, news, strict=True):
            sequence.token_ids.append(token)
            sequence.stops = bool(stops)

    def _choose(self, sequence: _Sequence, logits_V: Tensor) -> tuple[int, int]:
        seen = sequence.seen_ids() if self._sampling.repetition_penalty != 1.0 else []
        token = next_token(logits_V, seen, self._sampling, sequence.random)
        if token in self._eos_ids:
            return token, 1
        return token, int(self._on_token(sequence.request.index, token))

    def _retire(self) -> Iterator[Completion]:
        """Let finished sequences go; the last running one moves into each freed row."""
        ended = []
        for row in reversed(range(len(self._running))):
            sequence = self._running[row]
            reason = sequence.finish_reason()
            if reason is None:
                continue
            last = self._running.pop()
            if last is not sequence:
                self._cache.move_row(len(self._running), row, last.length)
                self._running[row] = last
            ended.append(Completion(sequence.request.index, tuple(sequence.token_ids), reason))
        yield from sorted(ended, key=lambda completion: completion.index)


@dataclass(frozen=True)
class _Piece:
    """Positions [start, stop) of one prompt, in one prefill step."""

    sequence: _Sequence
    row: int
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        return self.stop == len(self.sequence.request.prompt_ids)


def _chunks(sequences: list[_Sequence], first_row: int, size: int) -> Iterator[list[_Piece]]:
    """Deal the prompts' tokens into steps of at most `size` tokens; short prompts share a step."""
    chunk: list[_Piece] = []
    room = size
    for row, sequence in enumerate(sequences, first_row):
        start, length = 0, len(sequence.request.prompt_ids)
        while start < length:
            stop = min(length, start + room)
            chunk.append(_Piece(sequence, row, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield chunk
                chunk, room = [], size
    if chunk:
        yield chunk
