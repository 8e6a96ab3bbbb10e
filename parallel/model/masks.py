"""What is added to the scores of attention: -inf where a query does not look, 0 elsewhere.

Shape suffixes: T queries, L positions of the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from parallel.model.decoder import Segment, Step


def score_masks(
    step: Step, dtype: torch.dtype, window: int | None = None
) -> tuple[Tensor | None, ...]:
    """What is added to the scores of each run; a mask of bools would be converted in each layer.

    A run's mask is of the positions from `Segment.first_seen` on, decode's of all.
    """
    if step.segments:
        return tuple(_run_mask(step, segment, dtype, window) for segment in step.segments)
    sees_all = window is None or step.length <= window
    if sees_all and len(step.positions_T) == 1:  # step.length is this token's
        return (None,)
    places_L = torch.arange(step.length, device=step.positions_T.device)
    return (_hidden(step.positions_T, places_L, dtype, window)[:, None, None, :],)


def _run_mask(
    step: Step, segment: Segment, dtype: torch.dtype, window: int | None
) -> Tensor | None:
    sees_all = window is None or segment.length <= window
    if (sees_all and segment.starts_sequence) or segment.stop - segment.start == 1:
        return None
    positions_T = step.positions_T[segment.start : segment.stop]
    first = segment.first_seen(window)
    places_L = torch.arange(first, segment.length, device=positions_T.device)
    return _hidden(positions_T, places_L, dtype, window)


def _hidden(
    positions_T: Tensor, places_L: Tensor, dtype: torch.dtype, window: int | None
) -> Tensor:
    """-inf where a cached position comes after the query's or before its window, 0 elsewhere, [T, L]."""
    age_TL = positions_T.unsqueeze(1) - places_L
    is_hidden_TL = age_TL < 0 if window is None else (age_TL < 0) | (age_TL >= window)
    mask_TL = torch.zeros(age_TL.shape, dtype=dtype, device=positions_T.device)
    return mask_TL.masked_fill_(is_hidden_TL, float("-inf"))
