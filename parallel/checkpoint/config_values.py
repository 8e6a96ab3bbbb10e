"""Where a directory says what its model is: config.json, or the one YAML of MindFormers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parallel.checkpoint.json_file import read_json_object
from parallel.checkpoint.mindformers.directory import find_model_file, read_model_file

CONFIG = "config.json"


def config_file(directory: Path) -> Path:
    """Which file says it; config.json also where there is neither."""
    path = directory / CONFIG
    return path if path.exists() else find_model_file(directory) or path


def read_config_values(directory: Path) -> dict[str, Any]:
    """The contents of config.json, or what it would hold.

    Raises:
        CheckpointError: there is no such file, several YAML files, or one that is not read.
    """
    path = config_file(directory)
    return read_json_object(path) if path.name == CONFIG else dict(read_model_file(path).config)
