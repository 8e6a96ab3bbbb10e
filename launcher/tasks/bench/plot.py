"""Decode speed of a bench as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.picture import Axes, draw
from launcher.tasks.bench.record import Record


def draw_decode(records: Sequence[Record], path: Path) -> str:
    """Draw decode speed over the number of ranks, a line for each batch and prompt length.

    Returns:
        A sentence: where the picture is, or what is missing to draw it.
    """
    decodes = [record for record in records if record["phase"] == "decode"]

    def lines(axes: Axes) -> None:
        for batch, length in dict.fromkeys((r["batch_size"], r["prompt_length"]) for r in decodes):
            line = [r for r in decodes if (r["batch_size"], r["prompt_length"]) == (batch, length)]
            _draw_line(axes, line, f"batch {batch}, prompt {length}")
        axes.set(xlabel="tensor-parallel ranks", ylabel="decode tokens/s", title=_title(decodes[0]))
        axes.set_xticks(sorted({record["tp"] for record in decodes}))
        axes.set_ylim(bottom=0)
        axes.legend()

    return draw(path, lines, size=(7, 4.5))


def _draw_line(axes: Axes, line: Sequence[Record], label: str) -> None:
    sizes = [record["tp"] for record in line]
    speeds = [record["tokens_per_s"] for record in line]
    below = [record["tokens_per_s"] - record["tokens_per_s_least"] for record in line]
    above = [record["tokens_per_s_most"] - record["tokens_per_s"] for record in line]
    axes.errorbar(sizes, speeds, yerr=[below, above], marker="o", capsize=3, label=label)


def _title(record: Record) -> str:
    estimate = "estimate, " if record["estimate"] else ""
    return (
        f"{record['architecture']}, {record['num_hidden_layers']} layers of "
        f"{record['hidden_size']}, {record['scheme']} ({estimate}median, least to most)"
    )
