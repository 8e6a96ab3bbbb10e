"""The placement table of a plan: each kind of tensor, and what a rank has of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from launcher.table import print_table
from parallel.checkpoint.layout import Layout, StoredTensor
from parallel.model.config import ModelConfig
from parallel.model.placements import Row
from parallel.placement import SplitKVHeads, index_shape

_LAYER = re.compile(r"\.(\d+)\.")


def print_placements(layout: Layout, tp: int) -> None:
    """One line for the rows that differ in their layer only."""
    table: list[tuple[str, ...]] = [
        ("tensor", "shape", "dtype", "placement", f"rank 0 of {tp}", "MB a rank")
    ]
    for name, rows in _patterns(layout):
        first = rows[0][0].row
        table.append(
            (
                name,
                _shape(first.shape),
                " + ".join(_dtype(layout, tensor) for tensor in rows[0]),
                _placement(first, layout.config, tp),
                _shape(index_shape(first.index(0, tp))),
                f"{_largest_bytes(rows, tp) / 1e6:,.1f}",
            )
        )
    print_table(table)


def _dtype(layout: Layout, tensor: StoredTensor) -> str:
    """A weight's own: the bytes that hold two values of int4 are not what its shape counts."""
    is_weight = tensor.name in layout.schemes
    return layout.schemes[tensor.name].weight_dtype if is_weight else tensor.dtype


def _largest_bytes(rows: list[list[StoredTensor]], tp: int) -> int:
    """Bytes of the fullest rank; a weight's scales count with it. Rows of one pattern are alike."""
    return len(rows) * max(
        sum(tensor.num_bytes(rank, tp) for tensor in rows[0]) for rank in range(tp)
    )


def _placement(row: Row, config: ModelConfig, tp: int) -> str:
    """The row's placement; kv heads that are replicated say how often."""
    copies = tp // config.num_key_value_heads
    is_copied = isinstance(row.placement, SplitKVHeads) and copies > 1
    return f"{row.placement}, each on {copies} ranks" if is_copied else str(row.placement)


def _patterns(layout: Layout) -> list[tuple[str, list[list[StoredTensor]]]]:
    """Rows that differ in their layer only, together: pattern, and the stored parts of each row."""
    groups: dict[tuple[str, Any], list[list[StoredTensor]]] = {}
    for name, tensors in layout.parts.items():
        kinds = tuple((t.shape, t.dtype, t.row.placement, t.columns) for t in tensors)
        groups.setdefault((_LAYER.sub(".*.", name), kinds), []).append(list(tensors))
    return [(name.removeprefix("model."), rows) for (name, _), rows in groups.items()]


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
