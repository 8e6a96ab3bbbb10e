"""What a model thinks of given tokens: logits and log-probabilities, position by position.

Shapes: S scored tokens, V vocabulary, T tokens of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.errors import NumericsError
from parallel.generation.cache import KVCache
from parallel.model.decoder import Decoder, Segment, Step

# Of logits that are widened to float64 at a time: 32 MB.
_BLOCK_VALUES = 1 << 22


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one sequence that are given to the model.

    Attributes:
        row: the sequence's row of the cache.
        start: position of the first of the tokens; the cache holds those before it.
        num_scored: how many of the last tokens get logits, each of the token that follows it.
    """

    row: int
    start: int
    token_ids: Sequence[int]
    num_scored: int

    def split(self, size: int) -> tuple[Run, Run]:
        """The first `size` tokens, and the others."""
        rest = len(self.token_ids) - size
        head = replace(
            self, token_ids=self.token_ids[:size], num_scored=max(0, self.num_scored - rest)
        )
        tail = Run(self.row, self.start + size, self.token_ids[size:], min(self.num_scored, rest))
        return head, tail


def score(
    decoder: Decoder, cache: KVCache, token_ids: Sequence[int], first: int, chunk: int
) -> Tensor | None:
    """Logits that predict token `first` and every later one of a sequence.

    Args:
        cache: its first row is overwritten.
        first: index of the first token that is predicted, at least 1.
        chunk: most tokens of one step.

    Returns:
        float32 [len(token_ids) - first, vocabulary] on rank 0, None on the others.
    """
    run = Run(0, 0, token_ids[:-1], len(token_ids) - first)
    parts = [logits.cpu() for logits in scored_logits(decoder, cache, [run], chunk)]
    return torch.cat(parts) if parts else None


def token_log_probs(
    decoder: Decoder, cache: KVCache, runs: Sequence[Run], token_ids: Sequence[int], chunk: int
) -> Tensor | None:
    """The log-probability of a given token after each scored one.

    The logits of one step at a time are held, so memory is bounded by `chunk`.

    Args:
        token_ids: one for each scored token of the runs, in their order.

    Returns:
        float64 [S] on rank 0, None on the others and where nothing is scored.

    Raises:
        NumericsError: on rank 0, if one is not a number.
    """
    parts: list[Tensor] = []
    done = 0
    for logits_SV in scored_logits(decoder, cache, runs, chunk):
        parts.append(log_probs(logits_SV, token_ids[done : done + len(logits_SV)]))
        done += len(logits_SV)
    return torch.cat(parts) if parts else None


def log_probs(logits_SV: Tensor, token_ids: Sequence[int]) -> Tensor:
    """float64 [S], on the CPU: the log-probability of one token in each row of logits.

    Raises:
        NumericsError: one is infinite or not a number.
    """
    ids_S = torch.tensor(token_ids, dtype=torch.int64, device=logits_SV.device)
    num_rows = max(1, _BLOCK_VALUES // logits_SV.shape[1])
    blocks = zip(logits_SV.split(num_rows), ids_S.split(num_rows), strict=True)
    found_S = torch.cat([_block_log_probs(*block) for block in blocks]).cpu()
    if not found_S.isfinite().all():
        raise NumericsError(
            "a token's log-probability is not a number; the checkpoint is damaged, or float16 too "
            "narrow for it (dtype=float32)"
        )
    return found_S


def _block_log_probs(logits_SV: Tensor, ids_S: Tensor) -> Tensor:
    wide_SV = logits_SV.double()
    return wide_SV.gather(1, ids_S.unsqueeze(1)).squeeze(1) - wide_SV.logsumexp(1)


def scored_logits(
    decoder: Decoder, cache: KVCache, runs: Sequence[Run], chunk: int
) -> Iterator[Tensor]:
    """Logits [S, V] of the scored tokens, a step of at most `chunk` tokens at a time.

    Every rank must exhaust it; the others than rank 0 are given none.
    """
    for part in deal(runs, chunk):
        logits_SV = decoder(_step(decoder, cache, part), cache)
        if logits_SV is not None:
            yield logits_SV


def deal(runs: Sequence[Run], size: int) -> Iterator[list[Run]]:
    """The runs in steps of at most `size` tokens: short ones share a step, long ones take several."""
    part: list[Run] = []
    room = size
    for run in runs:
        while len(run.token_ids) > room:
            head, run = run.split(room)
            yield [*part, head] if room else part
            part, room = [], size
        part.append(run)
        room -= len(run.token_ids)
    if part:
        yield part


def _step(decoder: Decoder, cache: KVCache, runs: Sequence[Run]) -> Step:
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    select: list[int] = []
    segments: list[Segment] = []
    for run in runs:
        start, stop = len(ids), len(ids) + len(run.token_ids)
        run_positions = range(run.start, run.start + len(run.token_ids))
        ids += run.token_ids
        positions += run_positions
        slots += (run.row * cache.max_length + position for position in run_positions)
        select += range(stop - run.num_scored, stop)
        segments.append(Segment(run.row, start, stop, run_positions.stop))
    token_ids, places, targets, selected = (
        torch.tensor(values, dtype=torch.int64, device=decoder.device)
        for values in (ids, positions, slots, select)
    )
    return Step(token_ids, places, targets, selected, tuple(segments))
