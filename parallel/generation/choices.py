"""Which continuation of a prompt a model holds for likelier: summed log-probabilities.

A continuation may be several tokens: its log-probability is the sum of theirs, each after the ones
before it. The prompt is computed once; the continuations read its keys from the cache and write their
own behind them, one continuation over the other. Shapes: P problems, C choices of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.generation.cache import KVCache
from parallel.generation.score import Run, log_probs, scored_logits, token_log_probs
from parallel.model.decoder import Decoder


@dataclass(frozen=True)
class Problem:
    """A prompt of at least one token, and its continuations of at least one each."""

    prompt_ids: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Positions that it takes in the cache: nothing follows the last token."""
        return len(self.prompt_ids) + max(map(len, self.choices)) - 1


def choice_log_probs(
    decoder: Decoder, cache: KVCache, problems: Sequence[Problem], chunk: int
) -> Tensor | None:
    """The summed log-probability of each problem's continuations.

    Args:
        cache: at least as many rows as problems, each as long as the longest problem.
        problems: all of the same number of choices.
        chunk: most tokens of one step.

    Returns:
        float64 [P, C] on rank 0, None on the others.

    Raises:
        NumericsError: on rank 0, if one is not a number.
    """
    prompts = [Run(row, 0, problem.prompt_ids, 1) for row, problem in enumerate(problems)]
    parts = list(scored_logits(decoder, cache, prompts, chunk))
    rests = [
        _later_tokens(decoder, cache, problems, choice, chunk)
        for choice in range(len(problems[0].choices))
    ]
    if not parts:
        return None
    last_PV = torch.cat(parts)
    columns = [
        log_probs(last_PV, [problem.choices[choice][0] for problem in problems])
        for choice in range(len(rests))
    ]
    return torch.stack(columns, dim=1) + torch.stack(rests, dim=1)


def _later_tokens(
    decoder: Decoder, cache: KVCache, problems: Sequence[Problem], choice: int, chunk: int
) -> Tensor:
    """float64 [P]: the log-probability of one continuation but for its first token."""
    runs, targets, rows = [], [], []
    for row, problem in enumerate(problems):
        *before, last = problem.choices[choice]
        if before:
            runs.append(Run(row, len(problem.prompt_ids), before, len(before)))
            targets += [*before[1:], last]
            rows += [row] * len(before)
    sums_P = torch.zeros(len(problems), dtype=torch.float64)
    found_S = token_log_probs(decoder, cache, runs, targets, chunk)
    return sums_P if found_S is None else sums_P.index_add(0, torch.tensor(rows), found_S)
