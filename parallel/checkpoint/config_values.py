"""Where a directory says what its model is: config.json, Meta's params.json, or MindFormers' YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallel.checkpoint.json_file import read_json_object
from parallel.checkpoint.mindformers.directory import (
    find_model_file,
    read_model_file,
    yaml_files,
)
from parallel.checkpoint.readers.meta.config import PARAMS, read_meta_config
from parallel.checkpoint.readers.meta.source import is_meta
from parallel.errors import CheckpointError
from parallel.model.config import override_config
from parallel.model.families import as_config_json

CONFIG = "config.json"
# What nothing is taken for, and what MindFormers calls it.
_NEEDED = {
    "architectures": "arch.type", "vocab_size": "vocab_size", "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size", "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}  # fmt: skip


def config_file(directory: Path) -> Path:
    """Which file says it: config.json before the others, and also where there is none of them."""
    path = directory / CONFIG
    if path.exists():
        return path
    return directory / PARAMS if is_meta(directory) else find_model_file(directory) or path


def says_model(directory: Path) -> bool:
    """Whether a directory says what its model is."""
    return config_file(directory).exists()


def read_config_values(
    directory: Path, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The contents of config.json, or what it would hold.

    Args:
        overrides: values that stand in for those of config.json; where no file says what the model
            is, they must say all of it.

    Raises:
        CheckpointError: there is no such file, several YAML files, or one that is not read.
    """
    overrides = overrides or {}
    path = config_file(directory)
    if path.name == PARAMS:
        values = read_meta_config(directory)
    elif path.name != CONFIG:
        values = dict(read_model_file(path).config)
    elif not path.exists():
        _check_whole(directory, overrides)
        return as_config_json(overrides)
    else:
        values = read_json_object(path)
    return override_config(values, overrides)


def _check_whole(directory: Path, shape: Mapping[str, Any]) -> None:
    missing = [key for key in _NEEDED if shape.get(key) is None]
    if missing and (several := yaml_files(directory)):
        raise CheckpointError(
            f"{directory} must hold one YAML file, which says what the model is, but holds "
            f"{', '.join(path.name for path in several)}; leave the one that belongs to the weights, or "
            "give it as config=YAML."
        )
    if len(missing) == len(_NEEDED):
        raise CheckpointError(
            f"{directory / CONFIG} is missing, which says what the model is; copy it beside the "
            "weights, or give MindFormers' YAML as config=YAML."
        )
    if missing:
        listed = ", ".join(
            key if key == _NEEDED[key] else f"{key} (MindFormers' {_NEEDED[key]})"
            for key in missing
        )
        raise CheckpointError(
            f"{directory / CONFIG} is missing, and what is given in its place lacks {listed}; add that "
            "to the YAML of config=YAML, or copy config.json beside the weights."
        )
