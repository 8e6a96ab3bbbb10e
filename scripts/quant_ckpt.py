#!/usr/bin/env python3
"""Golden Stick's quant_ckpt.py: its flags become the words of a `shardrun prepare`, which is run.

    scripts/quant_ckpt.py -c CHECKPOINT -s boolq/dev.jsonl -t boolq -q ptq -w int8 -a int8 -o smooth

-c takes a MindFormers YAML, or a checkpoint's directory. What is written is
output/MODEL_APPROACH_ckpt/rank_0, rank_1, …; with -q ptq, APPROACH is as in ptq_smooth_a8w8c8. Words
of the form key=value are prepare's own, such as parallel.tp=2, output=DIRECTORY,
calibration.num_samples=64. The words are shown before they are run.

Defaults are Golden Stick's. The modules of -b are left alone beside those that the approach leaves
alone: lm_head, and w2 with smooth_quant.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

# From a checkout that is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import launcher
from launcher.failures import EXIT_USER, USER_ERRORS, ConfigError, one_line
from scripts.golden_stick.command_line import parse
from scripts.golden_stick.flags import APPROACHES, KEYS, choose
from scripts.golden_stick.names import output_name, source_words
from scripts.golden_stick.settings import data_words, left_out, quant_fields, read_settings


def words(argv: list[str]) -> list[str]:
    """The command line of `shardrun` that a command line of Golden Stick's stands for.

    Raises:
        ConfigError: a flag or value that is not known, contradicts another, has no counterpart or
            would have no effect.
    """
    given, own = parse(argv, __doc__)
    approach = APPROACHES[choose("-q", given["-q"], APPROACHES)]
    settings = read_settings(given, approach)
    source, folder, model = source_words(given["-c"], own)
    name = output_name(model, given["-q"], settings)
    made = {
        **source,
        "quant": approach.preset,
        **quant_fields(settings, approach),
        **left_out(given.get("-b", []), approach, settings),
        **data_words(given, settings),
        "output": str(Path(folder, name)),
    }
    _check_said_once(given, source, own)
    return ["prepare", *(f"{key}={value}" for key, value in {**made, **own}.items())]


def _check_said_once(
    given: Mapping[str, Any], source: Mapping[str, str], own: Mapping[str, str]
) -> None:
    """A word of prepare's would leave a flag without effect."""
    keys = {KEYS[short]: short for short in given if short in KEYS} | dict.fromkeys(source, "-c")
    for key in own:
        if key in keys:
            raise ConfigError(f"`{key}` is said by {keys[key]} as well; keep one of them.")


def main(argv: list[str]) -> NoReturn:
    """Become the command that a line of Golden Stick's stands for; exit 2 where it stands for none."""
    try:
        translated = words(argv)
    except USER_ERRORS as error:
        print(f"quant_ckpt.py: {one_line(error)}", file=sys.stderr)
        sys.exit(EXIT_USER)
    print(f"quant_ckpt.py: shardrun {shlex.join(translated)}", file=sys.stderr, flush=True)
    _become([sys.executable, "-m", "launcher", *translated])


def _become(command: list[str]) -> NoReturn:
    """The program takes this process's place: signals reach it, its exit status is ours, and the
    ranks it starts find the package that was imported here."""
    found, checkout = (
        Path(str(name)).resolve().parents[1] for name in (launcher.__file__, __file__)
    )
    environ = dict(os.environ)
    if found == checkout:
        path = [str(checkout), environ.get("PYTHONPATH", "")]
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    os.execve(command[0], command, environ)


if __name__ == "__main__":
    main(sys.argv[1:])
