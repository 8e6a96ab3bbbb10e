"""From logits to a token: the processors of transformers, in its order.

repetition_penalty (Keskar et al., CTRL, 2019), temperature, top_k, top_p (Holtzman et al., 2019).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.errors import NumericsError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        do_sample: False takes the most likely token; temperature, top_k and top_p have no part then.
        top_k: keep the k most likely; 0 keeps all.
        top_p: keep the most likely tokens that together reach this probability; 1.0 keeps all.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


def prompt_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of one prompt: they depend on its index, not on what runs beside it."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def next_token(
    logits_V: Tensor, seen_ids: Sequence[int], sampling: Sampling, generator: torch.Generator
) -> int:
    """Choose one token.

    Args:
        logits_V: float32 [vocabulary].
        seen_ids: prompt and generated tokens so far.
        generator: this prompt's own.

    Raises:
        NumericsError: a logit is infinite or not a number; any token would be garbage.
    """
    if not math.isfinite(float(logits_V.sum())) and not torch.isfinite(logits_V).all():
        raise NumericsError(
            "the logits hold a NaN or an infinity; the checkpoint is damaged, or float16 too narrow "
            "for it (dtype=float32)"
        )
    logits_V = process_logits(logits_V, seen_ids, sampling)
    if not sampling.do_sample:
        return int(logits_V.argmax())
    return int(torch.multinomial(logits_V.softmax(-1).cpu(), 1, generator=generator))


def process_logits(logits_V: Tensor, seen_ids: Sequence[int], sampling: Sampling) -> Tensor:
    """The logits after every processor that `sampling` asks for; refused tokens are -inf."""
    if sampling.repetition_penalty != 1.0:
        logits_V = _penalize(logits_V, seen_ids, sampling.repetition_penalty)
    if not sampling.do_sample:
        return logits_V
    if sampling.temperature != 1.0:
        logits_V = logits_V / sampling.temperature
    if sampling.top_k > 0:
        logits_V = _keep_top_k(logits_V, sampling.top_k)
    return _keep_top_p(logits_V, sampling.top_p) if sampling.top_p < 1.0 else logits_V


def _penalize(logits_V: Tensor, seen_ids: Sequence[int], penalty: float) -> Tensor:
    seen = torch.tensor(sorted(set(seen_ids)), device=logits_V.device)
    picked = logits_V[seen]
    return logits_V.index_put((seen,), torch.where(picked < 0, picked * penalty, picked / penalty))


def _keep_top_k(logits_V: Tensor, top_k: int) -> Tensor:
    smallest = torch.topk(logits_V, min(top_k, logits_V.numel())).values[-1]
    return logits_V.masked_fill(logits_V < smallest, float("-inf"))


def _keep_top_p(logits_V: Tensor, top_p: float) -> Tensor:
    ascending_V, order_V = logits_V.sort(descending=False)
    refused_V = ascending_V.softmax(-1).cumsum(-1) <= 1 - top_p
    refused_V[-1] = False
    return logits_V.masked_fill(refused_V.scatter(0, order_V, refused_V), float("-inf"))
