"""What `prepare` says at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from parallel.checkpoint.layout import Layout
from parallel.checkpoint.source import Source
from parallel.checkpoint.store import source_bytes


def print_summary(
    layout: Layout,
    source: Source,
    size: int,
    ranks: Sequence[int] | None,
    output: Path,
    seconds: float,
) -> None:
    """One line: what was written, how large, and how fast."""
    largest = max(layout.rank_bytes(rank, size) for rank in ranks or range(size))
    gb = source_bytes(layout, source, size, ranks) / 1e9
    print(
        f"{output}: tp={size}, {layout.scheme.label}, {largest / 1e9:.3g} GB a rank from "
        f"{gb:.3g} GB in {seconds:.1f} s ({gb / max(seconds, 1e-9):.2f} GB/s)"
    )
