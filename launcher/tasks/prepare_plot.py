"""The errors of a calibration as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from parallel.calibration.result import LayerError


def draw_errors(errors: Sequence[LayerError], label: str, path: Path) -> str:
    """Draw the error of each layer.

    Returns:
        A sentence: where the picture is, or what is missing to draw it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: matplotlib is missing; pip install 'shardrun[bench]' brings it"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    layers = range(len(errors))
    axes.plot(layers, [error.relative for error in errors], marker="o", label="relative error")
    axes.plot(layers, [1 - error.cosine for error in errors], marker="s", label="1 - cosine")
    axes.set(xlabel="decoder layer", title=f"error of each layer's output, {label}", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)
    return f"picture: {path}"
