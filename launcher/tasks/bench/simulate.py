"""One rank of a larger job alone, and what its collectives would cost. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.schema import BenchSection

# A host's ranks over shared memory, or hosts over a good network: neither the best nor the worst.
_LATENCY_US = 30.0
_GB_S = 5.0


@dataclass(frozen=True)
class CollectiveCost:
    """The usual model: a latency, and the bytes that a rank must send over its bandwidth.

    Args:
        size: number of ranks of the whole job.
        latency_us: of each collective, in microseconds.
        gb_s: what a rank sends while it receives as much.
    """

    size: int
    latency_us: float = _LATENCY_US
    gb_s: float = _GB_S

    @classmethod
    def of(cls, section: BenchSection, size: int) -> CollectiveCost:
        return cls(
            size, section.collective_latency_us or _LATENCY_US, section.collective_gb_s or _GB_S
        )

    def __call__(self, name: str, num_bytes: int) -> float:
        """Seconds of one collective on `num_bytes` of this rank's own."""
        if self.size == 1:
            return 0.0
        others = self.size - 1
        # A ring: an all-reduce is a reduce-scatter and an all-gather, each of the other ranks' parts.
        parts = {
            "all_reduce": 2 * others / self.size,
            "reduce_scatter": others / self.size,
            "all_gather": others,
            "gather": others,
            "barrier": 0,
        }
        return self.latency_us / 1e6 + parts.get(name, 1) * num_bytes / (self.gb_s * 1e9)
