"""Pictures: the one door to matplotlib, which a user may have installed or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Axes = Any  # matplotlib.axes.Axes, of which mypy is shown nothing


def draw(path: Path, draw_axes: Callable[[Axes], object], size: tuple[float, float]) -> str:
    """Draw one picture and save it.

    Args:
        draw_axes: puts the curves or bars on the axes it is given.
        size: width and height in inches.

    Returns:
        A sentence: where the picture is, or what is missing to draw it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: matplotlib is missing; pip install 'shardrun[bench]' brings it"
    figure = Figure(figsize=size, layout="constrained")
    draw_axes(figure.subplots())
    figure.savefig(path, dpi=150)
    return f"picture: {path}"
