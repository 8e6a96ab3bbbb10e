"""The file of `config=FILE`: shardrun's YAML, such as a run.yaml, or MindFormers' predict YAML."""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.environment.worker import Claim
from launcher.failures import ConfigError
from launcher.mindformers.translation import PredictFile, is_mindformers, translate
from launcher.schema import VERBATIM, keys
from parallel.checkpoint.mindformers.yaml_file import other_than_mapping, parse_yaml, where


@dataclass(frozen=True)
class ConfigFile:
    """What a file says.

    Attributes:
        values: the keys that it sets, such as `parallel.tp`; a group's key names a preset.
        predict: all that was read of it, if it is MindFormers'.
    """

    values: Mapping[str, Any]
    predict: PredictFile | None = None


def read_config_file(path: Path) -> dict[str, Any]:
    """The keys alone that a YAML file sets, as `open_config_file` reads it."""
    return dict(open_config_file(path).values)


def open_config_file(path: Path, claim: Claim | None = None) -> ConfigFile:
    """Read a YAML file of ours or of MindFormers.

    Relative paths in the file count from the working directory, as on the command line.

    Args:
        claim: what the launcher says of the number of ranks, which goes before MindFormers'.

    Raises:
        ConfigError: a file that cannot be read or is no mapping of keys, a key that is set twice, a
            MindFormers key that cannot be honoured. Unknown keys of ours are for the caller.
    """
    values = _load(path)
    predict = translate(values, str(path), claim) if is_mindformers(values) else None
    flat = predict.file.values if predict else _flatten(values, path)
    return ConfigFile({key: _verbatim(key, value, path) for key, value in flat.items()}, predict)


def _load(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(
                f"`config` {path} must be a regular file, but is none; give a YAML file."
            )
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"`config` {path} cannot be read ({error.strerror}); give a YAML file."
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or the 31st of February
        raise ConfigError(f"`config` {path} is not YAML ({where(error)}); correct it.") from error
    if other := other_than_mapping(values):
        raise ConfigError(
            f"`config` {path} must be a mapping of keys, but holds {other}; "
            "write `key: value` lines."
        )
    mapping: dict[str, Any] = values
    return mapping


def _flatten(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in (leaf for item in values.items() for leaf in _leaves(*item)):
        if key in flat:
            raise ConfigError(f"`{key}` is set twice in {path}; keep one of them.")
        flat[key] = value
    # A run.yaml names the file that it was composed from; what that said is in it already.
    flat.pop("config", None)
    return flat


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """`parallel: {tp: 2}` and `parallel.tp: 2` alike; a mapping below a leaf is its value."""
    leaves = {name for name, _ in keys()}
    sections = {name.partition(".")[0] for name in leaves if "." in name}
    if key in leaves or not (isinstance(value, dict) or (value is None and key in sections)):
        yield _as_group(key), value
        return
    for name, item in (value or {}).items():
        yield _as_group(f"{key}.{name}"), item


def _as_group(key: str) -> str:
    """A task is chosen as a group, so that `shardrun prepare config=run.yaml` prepares."""
    return "task" if key == "task.name" else key


def _verbatim(key: str, value: Any, path: Path) -> Any:
    """Texts must be strings (YAML makes `no` false and `1_0` ten); `~` of a path is expanded."""
    if key not in VERBATIM or value is None:
        return value
    if not isinstance(value, str):
        raise ConfigError(
            f"`{key}` in {path} must be a string, but is {value!r}; put it in quotes."
        )
    return value if key == "prompt" else os.path.expanduser(value)
