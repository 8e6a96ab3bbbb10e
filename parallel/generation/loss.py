"""Loss: a negative log-likelihood summed over tokens. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    """Negative log-likelihood, in nats, summed over tokens."""

    nll_sum: float
    num_tokens: int

    @classmethod
    def total(cls, losses: Iterable[Loss]) -> Loss:
        """The loss of all parts together; the sum is rounded once."""
        parts = list(losses)
        return cls(
            math.fsum(part.nll_sum for part in parts), sum(part.num_tokens for part in parts)
        )

    @property
    def mean_nll(self) -> float:
        return self.nll_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(mean NLL); infinite where a float64 cannot hold it."""
        return math.exp(self.mean_nll) if self.mean_nll < 700 else math.inf
