"""A command line of Golden Stick's, parsed: its flags, and words of shardrun's own."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from launcher.failures import ConfigError
from launcher.golden_stick.flags import APPROACHES, DATASETS, FLAGS, WITHOUT_COUNTERPART, listed


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help.")


def _make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        usage="%(prog)s -c CONFIG -q APPROACH [flags] [key=value …]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(short: str, long: str, text: str, **more: Any) -> None:
        action = "extend" if "nargs" in more else "append"
        parser.add_argument(
            short, f"--{long}", dest=short, metavar="…", action=action, help=text, **more
        )

    add("-c", "config_path", "needed: a MindFormers YAML, or a checkpoint's directory")
    add("-q", "approach", f"needed: {listed(APPROACHES)}")
    add("-s", "dataset_path", "calibration data: JSONL or text")
    add("-t", "dataset_type", f"what kind of data -s is: {listed(DATASETS)}")
    for flag in FLAGS:
        add(flag.short, flag.long, f"{listed(flag.values)}; {flag.default} if left out")
    add("-b", "opname_blacklist", "modules to leave alone, such as w2", nargs="*")
    for short, (long, nothing) in WITHOUT_COUNTERPART.items():
        add(short, long, f"refused, unless it is {nothing!r}")
    return parser


def parse(argv: Sequence[str], description: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The flags that were given, by their short names, and prepare's own words.

    Args:
        description: for --help.

    Raises:
        ConfigError: a word that is neither a flag nor key=value, or a flag that is given twice.
    """
    parser = _make_parser(description)
    parsed, rest = parser.parse_known_args(argv)
    given = {short: value for short, value in vars(parsed).items() if value is not None}
    if "-b" in given:
        # The words behind -b are taken for modules, of which none has a `=`.
        rest += [word for word in given["-b"] if "=" in word]
        given["-b"] = [word for word in given["-b"] if "=" not in word]
    own: dict[str, str] = {}
    for word in rest:
        key, equals, value = word.partition("=")
        if word.startswith("-") or not equals:
            raise ConfigError(_stray_word(key, parser))
        own[key] = value
    given |= {short: _one(short, given[short]) for short in given.keys() - {"-b"}}
    _take_approach(given)
    _check_counterparts(given)
    return given, own


def _stray_word(word: str, parser: argparse.ArgumentParser) -> str:
    flags = [name for name in parser.format_help().replace(",", " ").split() if name[0] == "-"]
    close = get_close_matches(word, flags, n=1) if word.startswith("-") else []
    hint = f"did you mean {close[0]}?" if close else "see --help."
    return f"{word!r} is neither a flag of quant_ckpt.py nor key=value; {hint}"


def _one(short: str, values: list[str]) -> str:
    """The value of a flag; of several, all but one would be without effect."""
    if len(values) > 1:
        raise ConfigError(f"`{short}` must be given once, but is {listed(values)}; keep one.")
    return values[0]


def _take_approach(given: dict[str, Any]) -> None:
    """The English guide writes `-a rtn-a16w8`, which is no dtype of activations."""
    if "-q" not in given and str(given.get("-a")).lower() in APPROACHES:
        given["-q"] = given.pop("-a")
    needed = {"-c": "--config_path", "-q": "--approach"}
    if missing := [f"{short}/{long}" for short, long in needed.items() if short not in given]:
        raise ConfigError(f"the following arguments are required: {listed(missing)}; see --help.")


def _check_counterparts(given: Mapping[str, Any]) -> None:
    for short, (long, nothing) in WITHOUT_COUNTERPART.items():
        if str(given.get(short, nothing)).lower() != nothing:
            raise ConfigError(
                f"`{short}` ({long}) is {given[short]!r}, but shardrun prepare has nothing like it; "
                "leave it out."
            )
