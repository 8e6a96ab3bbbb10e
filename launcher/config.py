"""How a command line becomes a Config.

The only importer of hydra and omegaconf; past this module there are plain dataclasses.
"""

from __future__ import annotations

import os.path
import reprlib
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from typing import Any

from launcher.completion import complete
from launcher.config_file import ConfigFile, open_config_file
from launcher.environment.worker import Claim
from launcher.failures import ConfigError
from launcher.schema import (
    GROUPS,
    PATHS,
    READ_TEXTS,
    TEXTS,
    VERBATIM,
    WORDS,
    Config,
    group_options,
    keys,
    kind_of,
)

_MOST_VALUES = 100_000
# Keys of which one on the command line stands in for another of a file.
_RIVALS = (
    {"prompt", "prompts", "prompts_file"},
    {"generation.max_new_tokens", "generation.max_length"},
)


def compose(
    arguments: list[str],
    claim: Claim | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Config:
    """A command line of `key=value` as a Config.

    Order, later wins: schema, presets of the groups, the file of `config=`, the command line. What
    is still open then may be filled in from MindFormers' YAML (completion.py).

    Args:
        claim: what the launcher says of the number of ranks.
        say: told what of a MindFormers file is not used.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a line that cannot be read.
        CheckpointError: the directory of the checkpoint cannot be looked at.
    """
    overrides = [_split(argument) for argument in arguments]
    file = _open_file(overrides, claim)
    values = dict(file.values)
    for key, _ in overrides:
        values = _without_rivals(values, key)
    for key, text in overrides:
        values[key] = text if key in VERBATIM or key in GROUPS else _parse(key, text)
    values = {key: _in_words(key, value) for key, value in values.items()}
    node = _compose_groups({key: value for key, value in values.items() if key in GROUPS})
    texts = {key: values.pop(key) for key in TEXTS if key in values}
    for key, value in values.items():
        if key not in GROUPS:
            _update(node, key, value)
    config = _to_config(node)
    for key, value in texts.items():
        _set_text(config, key, value)
    config, notes = complete(config, dict(overrides), file)
    for note in notes:
        say(note)
    _check_rules(config)
    _check_stdin(config)
    return config


def _split(argument: str) -> tuple[str, str]:
    key, equals, value = argument.partition("=")
    if not equals:
        raise ConfigError(_stray_word(argument))
    # A task is chosen as a group, by whichever of its two names.
    key = "task" if key == "task.name" else key
    _check_key(key)
    if key in GROUPS:
        _check_option(key, value.lower())
    return key, os.path.expanduser(value) if key in PATHS else value


def _in_words(key: str, value: Any) -> Any:
    """A value that is one of a few words is taken in any case, and written as here."""
    is_word = key in WORDS or key in GROUPS
    return value.lower() if is_word and isinstance(value, str) else value


def _stray_word(word: str) -> str:
    tasks = group_options("task")
    close = get_close_matches(word, tasks, n=1)
    if close:
        return f"{word!r} is not a task; did you mean {close[0]}? tasks: {', '.join(tasks)}."
    return f"{word!r} is not a task and not of the form key=value; see shardrun --help."


def _check_key(key: str) -> None:
    known = [name for name, _ in keys()] + list(GROUPS)
    if key in known:
        return
    if key.startswith(("+", "~")):
        raise ConfigError(f"{key!r}: keys are set, never added or removed; write key=value.")
    raise ConfigError(f"{_quoted(key)} is not a key; {_nearest(key, known)}")


def _quoted(key: str) -> str:
    """A key as it was typed; as Python would write it where that is not one printable line."""
    return f"`{key}`" if key.isprintable() else repr(key)


def _nearest(word: str, known: list[str]) -> str:
    """`tensor_parallel.tp`, `tp` and `parallel.tq` should all lead to `parallel.tp`."""
    by_leaf = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    close = by_leaf or get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else "see shardrun --help."


def _check_option(group: str, name: str) -> None:
    options = group_options(group)
    if name not in options:
        close = get_close_matches(name, options, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"`{group}` has no choice {name!r}; {hint}choices: {', '.join(options)}.")


def _open_file(overrides: list[tuple[str, str]], claim: Claim | None) -> ConfigFile:
    paths = [value for key, value in overrides if key == "config"]
    if not paths or paths[-1] == "null":
        return ConfigFile({})
    try:
        file = open_config_file(Path(paths[-1]), claim)
        _check_size(file.values, paths[-1])
    except RecursionError as error:
        raise ConfigError(f"`config` {paths[-1]} is nested without end; correct it.") from error
    for key, value in file.values.items():
        _check_key(key)
        if key in GROUPS:
            _check_option(key, str(value).lower())
    return file


def _check_size(values: Mapping[str, Any], path: str) -> None:
    """A few lines of YAML whose aliases name each other can stand for more than fits in memory."""
    waiting: list[Any] = [values]
    for _ in range(_MOST_VALUES):
        if not waiting:
            return
        value = waiting.pop()
        if isinstance(value, Mapping | list):
            waiting += value.values() if isinstance(value, Mapping) else value
    raise ConfigError(f"`config` {path} must have at most {_MOST_VALUES} values; shorten it.")


def _compose_groups(choices: Mapping[str, str]) -> Any:
    import hydra
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name="schema", node=Config)
    with hydra.initialize_config_module("conf", version_base="1.3"):
        node = hydra.compose("config", [f"{key}={value}" for key, value in choices.items()])
    OmegaConf.set_struct(node, True)
    return node


def _parse(key: str, text: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
    except (HydraException, RecursionError) as error:
        raise ConfigError(
            f"`{key}` cannot be read from {_shown(text)}; put the value in quotes: {key}=\"'…'\"."
        ) from error
    except ValueError as error:  # Python's own limit of an integer's digits
        raise ConfigError(
            f"`{key}` must have numbers of at most {sys.get_int_max_str_digits():,} digits, but is "
            f"{_shown(text)}; shorten it."
        ) from error
    if override.is_sweep_override():
        raise ConfigError(
            f"`{key}` must be one value, but is {_shown(text)}; lists go in brackets: [a,b]."
        )
    return override.value()


def _without_rivals(values: dict[str, Any], key: str) -> dict[str, Any]:
    """What a key of the command line replaces: a preset, all fields of its group."""
    rivals = next((group for group in _RIVALS if key in group), set())
    prefix = f"{key}." if key in GROUPS else "\0"
    return {
        name: value
        for name, value in values.items()
        if name not in rivals and not name.startswith(prefix)
    }


def _update(node: Any, key: str, value: Any) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        OmegaConf.update(node, key, value, merge=False)
        OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError, OverflowError) as error:
        raise ConfigError(f"`{key}` must be {kind_of(key)}, but is {_shown(value)}.") from error


def _set_text(config: Config, key: str, value: Any) -> None:
    # A prompt is what is typed; a template of this one word could ask nothing.
    if (key in PATHS or key == "eval.template") and value == "null":
        value = None
    is_list = key not in VERBATIM
    if is_list and isinstance(value, list):
        for item in value:
            _check_text(key, item)
    elif value is not None and not is_list:
        _check_text(key, value)
    elif value is not None or "null" not in kind_of(key):
        raise ConfigError(f"`{key}` must be {kind_of(key)}, but is {_shown(value)}.")
    section, _, name = key.rpartition(".")
    setattr(getattr(config, section) if section else config, name, value)


def _check_text(key: str, value: object) -> None:
    """A number or a word like `true` has lost how it was typed; a broken character cannot be
    written to any file."""
    if not isinstance(value, str):
        raise ConfigError(
            f"`{key}` must be {kind_of(key)}, but holds {_shown(value)}; put it in quotes: ['…']."
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigError(f"`{key}` must be UTF-8 text, but is {value!r}; type it anew.")
    if key in PATHS and (not value or "\0" in value):
        raise ConfigError(f"`{key}` must be a path, but is {value!r}; leave it out, or give one.")


def _shown(value: object) -> str:
    """A value of any size as part of a sentence."""
    shown = reprlib.Repr()
    shown.maxlevel, shown.maxlist, shown.maxdict = 3, 10, 10
    shown.maxstring = shown.maxother = shown.maxlong = 200
    return shown.repr(value)


def _check_rules(config: Config) -> None:
    for key, item in keys():
        value, rule = attrgetter(key)(config), item.metadata["rule"]
        if value is not None and rule and not rule.allows(value):
            raise ConfigError(f"`{key}` must be {rule.words}, but is {value}.")


def _check_stdin(config: Config) -> None:
    named = [key for key in READ_TEXTS if attrgetter(key)(config) == "-"]
    if len(named) > 1:
        raise ConfigError(
            f"`{named[1]}` is -, which is stdin, but so is {named[0]}, and it is read once; give a file "
            "for one of them."
        )


def _to_config(node: Any) -> Config:
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    return config
