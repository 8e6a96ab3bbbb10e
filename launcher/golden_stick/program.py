"""Golden Stick's quant_ckpt.py: its flags become the words of a `shardrun prepare`, which is run.

    shardrun-quant-ckpt -c CONFIG -s boolq/dev.jsonl -t boolq -q ptq -w int8 -a int8 -o smooth

-c takes a MindFormers YAML, or a checkpoint's directory. What is written is
output/MODEL_APPROACH_ckpt/rank_0, rank_1, …; with -q ptq, APPROACH is as in ptq_smooth_a8w8c8. Two
links are made beside: output/APPROACH_ckpt, and rank_N/rtn-a16w8.ckpt (or what -q says), so that the
paths of MindFormers' guide lead there. Words of the form key=value are prepare's own, such as
parallel.tp=2, output=DIRECTORY, calibration.num_samples=64. The words are shown before they are run,
and at the end the line to type next.

Defaults are Golden Stick's. The modules of -b are left alone beside those that the approach leaves
alone: lm_head, and w2 with smooth_quant.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.__main__ import main as run_command
from launcher.environment.detection import detect
from launcher.failures import EXIT_USER, USER_ERRORS, ConfigError, one_line
from launcher.golden_stick.command_line import parse
from launcher.golden_stick.flags import APPROACHES, KEYS, choose
from launcher.golden_stick.links import link_output, link_ranks
from launcher.golden_stick.names import output_name, source_words
from launcher.golden_stick.next_line import next_line
from launcher.golden_stick.settings import (
    data_notes,
    data_words,
    left_out,
    quant_fields,
    read_settings,
)


@dataclass(frozen=True)
class Line:
    """What a command line of Golden Stick's stands for.

    Attributes:
        words: the command line of `shardrun`.
        notes: what of it is not used, and why.
        source: what -c says.
        output: the directory that is written.
        alias: its name in MindFormers' guide, without the model; None: `output` is a word of prepare's.
        approach: what -q says, which names the files of Golden Stick.
    """

    words: list[str]
    notes: list[str]
    source: str
    output: Path
    alias: str | None
    approach: str


def read_line(argv: Sequence[str]) -> Line:
    """Translate a command line.

    Raises:
        ConfigError: a flag or value that is not known, contradicts another, has no counterpart or
            would have no effect.
    """
    given, own = parse(argv, __doc__)
    given["-q"] = choose("-q", given["-q"], APPROACHES)
    approach = APPROACHES[given["-q"]]
    settings = read_settings(given, approach)
    source, folder, model = source_words(given["-c"], own)
    alias = output_name(given["-q"], settings)
    made = {
        **source,
        "quant": approach.preset,
        **quant_fields(settings, approach),
        **left_out(given.get("-b", []), approach, settings),
        **data_words(given, approach),
        "output": str(Path(folder, f"{model}_{alias}")),
    }
    _check_said_once(given, source, own)
    words = {**made, **own}
    return Line(
        words=["prepare", *(f"{key}={value}" for key, value in words.items())],
        notes=data_notes(given, approach),
        source=given["-c"],
        output=Path(os.path.expanduser(words["output"])),
        alias=None if "output" in own else alias,
        approach=given["-q"],
    )


def _check_said_once(
    given: Mapping[str, Any], source: Mapping[str, str], own: Mapping[str, str]
) -> None:
    """A word of prepare's would leave a flag without effect."""
    keys = {KEYS[short]: short for short in given if short in KEYS} | dict.fromkeys(source, "-c")
    for key in own:
        if key in keys:
            raise ConfigError(f"`{key}` is said by {keys[key]} as well; keep one of them.")


def main(argv: Sequence[str] | None = None, predict: Sequence[str] = ("shardrun-predict",)) -> int:
    """Run the command that a line of Golden Stick's stands for; returns its exit status, or 2 where
    the line stands for none.

    Args:
        predict: how the user starts what generates.
    """
    try:
        line = read_line(sys.argv[1:] if argv is None else argv)
    except USER_ERRORS as error:
        _say([one_line(error)])
        return EXIT_USER
    _say([*line.notes, f"shardrun {shlex.join(line.words)}"])
    status = run_command(line.words)
    if status == 0 and _may_finish() and link_ranks(line.output, line.approach):
        if line.alias is not None:
            _say(link_output(line.output, line.alias))
        print(f"next: {shlex.join(next_line(predict, line.source, line.output))}", flush=True)
    return status


def _may_finish() -> bool:
    """Of several processes rank 0 does what is left to do; where ranks are handed out at the
    rendezvous, the one that makes the first link."""
    environment = detect(os.environ)
    return not environment.is_scheduler and environment.rank in (None, 0)


def _say(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
