"""Where a directory says what its model is: config.json, Meta's params.json, or MindFormers' YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parallel.checkpoint.json_file import read_json_object
from parallel.checkpoint.mindformers.directory import find_model_file, read_model_file
from parallel.checkpoint.readers.meta.config import PARAMS, read_meta_config
from parallel.checkpoint.readers.meta.source import is_meta

CONFIG = "config.json"


def config_file(directory: Path) -> Path:
    """Which file says it: config.json before the others, and also where there is none of them."""
    path = directory / CONFIG
    if path.exists():
        return path
    return directory / PARAMS if is_meta(directory) else find_model_file(directory) or path


def read_config_values(directory: Path) -> dict[str, Any]:
    """The contents of config.json, or what it would hold.

    Raises:
        CheckpointError: there is no such file, several YAML files, or one that is not read.
    """
    path = config_file(directory)
    if path.name == PARAMS:
        return read_meta_config(directory)
    return read_json_object(path) if path.name == CONFIG else dict(read_model_file(path).config)
