"""Logits of given tokens: what a model thinks of a text, position by position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.generation.cache import KVCache
from parallel.model.decoder import Decoder, Segment, Step


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
    parts = []
    for start in range(0, len(token_ids) - 1, chunk):
        stop = min(start + chunk, len(token_ids) - 1)
        logits = decoder(_step(decoder, token_ids, start, stop, first), cache)
        if logits is not None:
            parts.append(logits.cpu())
    return torch.cat(parts) if parts else None


def _step(decoder: Decoder, ids: Sequence[int], start: int, stop: int, first: int) -> Step:
    positions = torch.arange(start, stop, device=decoder.device)
    return Step(
        token_ids_T=torch.tensor(ids[start:stop], dtype=torch.int64, device=decoder.device),
        positions_T=positions,
        slots_T=positions,
        # The logits at position p predict token p + 1.
        select_S=(positions + 1 >= first).nonzero().flatten(),
        segments=(Segment(0, 0, stop - start, stop),),
    )
