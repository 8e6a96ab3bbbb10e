"""The whole of `model`: its shape, how it answers, and how it is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.mindformers.generation import take_generation
from parallel.checkpoint.mindformers.file import ReadFile
from parallel.checkpoint.mindformers.quantization import take_quantization
from parallel.checkpoint.mindformers.shape import present, take_shape


def take_model(file: ReadFile, model: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """The whole of `model`: an unknown key is refused."""
    take_shape(file, model, config)
    take_generation(file, present(config))
    take_quantization(file, config.get("quantization_config"))
