"""One case of a bench, on one rank: prefill and decode as the generation loop does them.

Shapes: B sequences, P prompt tokens, S selected tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from launcher.tasks.bench.work import Case
from parallel.generation.cache import KVCache
from parallel.group import SimulatedGroup
from parallel.model.decoder import Decoder, Segment, Step


@dataclass(frozen=True)
class Phase:
    """What one rank saw of a prefill or a decode.

    Attributes:
        seconds: from the barrier before it to its last token.
        calls_s: those spent in each collective, waiting for other ranks included.
    """

    seconds: float
    calls_s: tuple[float, ...]

    @property
    def communication_s(self) -> float:
        """Those spent in all collectives."""
        return sum(self.calls_s)


@dataclass(frozen=True)
class Runner:
    """Runs a case on this rank.

    Args:
        decoder: its group times the collectives.
        cache: of at least the case's rows and length.
        barrier: lets the ranks begin a phase together.
    """

    decoder: Decoder
    cache: KVCache
    barrier: Callable[[], None]

    def run(self, ids_BP: Tensor, case: Case) -> tuple[Phase, Phase]:
        """Prefill, then `new_tokens` decode steps."""
        tokens: list[int] = []
        prefill = self._timed(lambda: tokens.extend(self._prefill(ids_BP, case.chunk)))
        decode = self._timed(lambda: self._decode(tokens, case))
        return prefill, decode

    def _timed(self, phase: Callable[[], None]) -> Phase:
        group = self.decoder.group
        self.barrier()
        calls: list[float] = []
        group.calls, start = calls, time.perf_counter()
        phase()
        spent, group.calls = time.perf_counter() - start, None
        # A simulated collective is counted, but nobody waits for it.
        modelled = sum(calls) if isinstance(group, SimulatedGroup) else 0.0
        return Phase(spent + modelled, tuple(calls))

    def _prefill(self, ids_BP: Tensor, chunk: int) -> Iterator[int]:
        for step in prefill_steps(ids_BP, self.cache.max_length, chunk):
            yield from self._step(step)

    def _decode(self, tokens: list[int], case: Case) -> None:
        for position in range(case.prompt_length, case.length):
            tokens = self._step(decode_step(tokens, position, self.cache.max_length, self._device))

    def _step(self, step: Step) -> list[int]:
        """The likeliest next token of each selected position, told to all ranks by rank 0."""
        logits_SV = self.decoder(step, self.cache)
        if step.select_S.numel() == 0:
            return []
        chosen_S = torch.zeros_like(step.select_S) if logits_SV is None else logits_SV.argmax(-1)
        tokens: list[int] = self.decoder.group.broadcast(chosen_S).tolist()
        return tokens

    @property
    def _device(self) -> torch.device:
        return self.decoder.device


def prefill_steps(ids_BP: Tensor, max_length: int, chunk: int) -> Iterator[Step]:
    """The prompts' tokens one after the other, in steps of at most `chunk`."""
    prompt_length = ids_BP.shape[1]
    flat = torch.arange(ids_BP.numel(), device=ids_BP.device)
    for places in flat.split(chunk):
        rows, positions = places // prompt_length, places % prompt_length
        yield Step(
            token_ids_T=ids_BP.flatten()[places],
            positions_T=positions,
            slots_T=rows * max_length + positions,
            select_S=(positions == prompt_length - 1).nonzero().flatten(),
            segments=_segments(int(places[0]), int(places[-1]) + 1, prompt_length),
        )


def _segments(start: int, stop: int, prompt_length: int) -> tuple[Segment, ...]:
    """The runs of each prompt among the flat tokens [start, stop)."""
    found = []
    for row in range(start // prompt_length, (stop - 1) // prompt_length + 1):
        first = max(start, row * prompt_length)
        last = min(stop, (row + 1) * prompt_length)
        found.append(Segment(row, first - start, last - start, last - row * prompt_length))
    return tuple(found)


def decode_step(tokens: list[int], position: int, max_length: int, device: torch.device) -> Step:
    """The next token of each row, all at one position."""
    rows_B = torch.arange(len(tokens), device=device)
    return Step(
        token_ids_T=torch.tensor(tokens, dtype=torch.int64, device=device),
        positions_T=torch.full_like(rows_B, position),
        slots_T=rows_B * max_length + position,
        select_S=rows_B,
        length=position + 1,
    )
