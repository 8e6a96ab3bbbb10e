"""The errors of a calibration as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.picture import Axes, draw
from parallel.calibration.result import LayerError


def draw_errors(errors: Sequence[LayerError], label: str, path: Path) -> str:
    """Draw the error of each layer.

    Returns:
        A sentence: where the picture is, or what is missing to draw it.
    """

    def curves(axes: Axes) -> None:
        layers = range(len(errors))
        axes.plot(layers, [error.relative for error in errors], marker="o", label="relative error")
        axes.plot(layers, [1 - error.cosine for error in errors], marker="s", label="1 - cosine")
        title = f"error of each layer's output, {label}"
        axes.set(xlabel="decoder layer", title=title, yscale="log")
        axes.legend()

    return draw(path, curves, size=(7, 4))
