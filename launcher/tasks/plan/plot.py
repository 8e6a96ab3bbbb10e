"""Memory of a rank over the sizes, as a picture: stacked bars against what a rank has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from launcher.picture import Axes, draw
from launcher.tasks.plan.report import Report
from parallel.checkpoint.plan import RankPlan


def draw_memory(report: Report, path: Path) -> str:
    """Draw a bar for each size.

    Returns:
        A sentence: where the picture is, or what is missing to draw it.
    """

    def bars(axes: Axes) -> None:
        sizes = [str(tp) for tp in report.sizes]
        bottom = [0.0] * len(sizes)
        for kind, heights in _stacks([plan.rank for plan in report.sizes.values()]).items():
            axes.bar(sizes, heights, bottom=bottom, label=kind)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        _draw_memory_line(axes, report)
        axes.set(xlabel="tensor-parallel ranks", ylabel="GB a rank", title=_title(report))
        axes.legend()

    return draw(path, bars, size=(7, 4.5))


def _draw_memory_line(axes: Axes, report: Report) -> None:
    """A step over each bar, unless it would press the bars flat."""
    memory = [plan.memory_bytes / 1e9 for plan in report.sizes.values()]
    tallest = max(plan.rank.total_bytes for plan in report.sizes.values()) / 1e9
    for at, height in enumerate(memory):
        if height <= 2 * tallest:
            label = "memory of a rank" if at == memory.index(min(memory)) else None
            axes.hlines(height, at - 0.45, at + 0.45, colors="black", label=label)


def _stacks(ranks: list[RankPlan]) -> Mapping[str, list[float]]:
    return {
        "linears": [rank.linear_bytes / 1e9 for rank in ranks],
        "embedding and lm_head": [rank.embedding_bytes / 1e9 for rank in ranks],
        "norms and others": [rank.other_bytes / 1e9 for rank in ranks],
        "KV cache": [rank.kv_cache_bytes / 1e9 for rank in ranks],
        "temporaries": [rank.temporary_bytes / 1e9 for rank in ranks],
    }


def _title(report: Report) -> str:
    config, workload = report.layout.config, report.workload
    return (
        f"{config.architecture}, {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{report.layout.scheme.label}, {workload.batch_size} x {workload.max_length} tokens"
    )
