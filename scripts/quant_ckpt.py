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

import argparse
import io
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml

# From a checkout that is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import launcher
from launcher.config_file import read_config_file
from launcher.failures import EXIT_USER, USER_ERRORS, ConfigError, one_line


@dataclass(frozen=True)
class Flag:
    """A flag of theirs that sets a field of `quant`.

    Attributes:
        values: what it may say; the first is Golden Stick's default.
        needs: the flag without which it has no effect.
    """

    short: str
    long: str
    field: str
    values: tuple[str, ...]
    needs: str | None = None

    @property
    def default(self) -> str:
        return self.values[0]


@dataclass(frozen=True)
class Approach:
    """A value of -q.

    Attributes:
        fixed: what the preset says of -w -a -k -o -p, where it is not none; None: they say it.
        left_out: the modules it leaves alone. PTQ walks decoder layers, and lm_head is in none.
    """

    preset: str
    fixed: Mapping[str, str] | None
    left_out: tuple[str, ...]


FLAGS = (
    Flag("-w", "weight_quant_dtype", "weight_dtype", ("none", "int8", "int4")),
    Flag("-a", "act_quant_dtype", "activation_dtype", ("none", "int8")),
    Flag("-k", "kvcache_quant_dtype", "kvcache_dtype", ("none", "int8")),
    Flag("-o", "outliers_suppression", "outliers_suppression", ("none", "smooth", "awq")),
    Flag("-p", "precision_recovery", "precision_recovery", ("none", "gptq")),
    Flag(
        "-ag", "act_quant_granularity", "act_quant_granularity", ("per_tensor", "per_token"), "-a"
    ),
    Flag(
        "-wg",
        "weight_quant_granularity",
        "weight_quant_granularity",
        ("per_channel", "per_group"),
        "-w",
    ),
    Flag(
        "-kvg",
        "kvcache_quant_granularity",
        "kvcache_quant_granularity",
        ("per_channel", "per_token"),
        "-k",
    ),
    Flag("-g", "group_size", "group_size", ("0", "32", "64", "128"), "-w"),
)
APPROACHES = {
    "rtn-a16w8": Approach("rtn_a16w8", {"-w": "int8"}, ("lm_head",)),
    "rtn-c8": Approach("rtn_c8", {"-k": "int8"}, ()),
    "smooth_quant": Approach(
        "smooth_quant", {"-w": "int8", "-a": "int8", "-o": "smooth"}, ("lm_head", "w2")
    ),
    "ptq": Approach("ptq", None, ("lm_head",)),
}
# Of each kind of data, whether it is JSONL: prepare tells JSONL from text by the file's name, and
# finds BoolQ's question and passage by itself.
DATASETS = {"boolq": True, "jsonl": True, "wikitext2": False, "text": False}
# Flags that prepare has nothing for, and the one value that asks for nothing.
WITHOUT_COUNTERPART = {"-e": ("debug_mode", "False"), "-d": ("dump_path", "")}
# The keys that their other flags set.
_KEYS = {
    "-q": "quant", "-s": "calibration.data", "-b": "quant.modules_to_not_convert",
    **{flag.short: f"quant.{flag.field}" for flag in FLAGS},
}  # fmt: skip


def words(argv: list[str]) -> list[str]:
    """The command line of `shardrun` that a command line of Golden Stick's stands for.

    Raises:
        ConfigError: a flag or value that is not known, contradicts another, has no counterpart or
            would have no effect.
    """
    given, own = _parse(argv)
    approach = APPROACHES[_choose("-q", given["-q"], APPROACHES)]
    settings = _settings(given, approach)
    source, folder, model = _source(given["-c"], own)
    name = _name(model, given["-q"], settings)
    made = {
        **source,
        "quant": approach.preset,
        **_fields(settings, approach),
        **_left_out(given.get("-b", []), approach, settings),
        **_data(given, settings),
        "output": str(Path(folder, name)),
    }
    _check_said_once(given, source, own)
    return ["prepare", *(f"{key}={value}" for key, value in {**made, **own}.items())]


# -------------------------------------------------------------------------------- the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        usage="%(prog)s -c CONFIG -q APPROACH [flags] [key=value …]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(short: str, long: str, text: str, **more: Any) -> None:
        action = "extend" if "nargs" in more else "append"
        parser.add_argument(
            short, f"--{long}", dest=short, metavar="…", action=action, help=text, **more
        )

    add("-c", "config_path", "a MindFormers YAML, or a checkpoint's directory", required=True)
    add("-q", "approach", _listed(APPROACHES), required=True)
    add("-s", "dataset_path", "calibration data: JSONL or text")
    add("-t", "dataset_type", f"what kind of data -s is: {_listed(DATASETS)}")
    for flag in FLAGS:
        add(flag.short, flag.long, f"{_listed(flag.values)}; {flag.default} if left out")
    add("-b", "opname_blacklist", "modules to leave alone, such as w2", nargs="*")
    for short, (long, nothing) in WITHOUT_COUNTERPART.items():
        add(short, long, f"refused, unless it is {nothing!r}")
    return parser


def _parse(argv: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The flags that were given, by their short names, and prepare's own words."""
    parser = _parser()
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
        raise ConfigError(f"`{short}` must be given once, but is {_listed(values)}; keep one.")
    return values[0]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _choose(short: str, value: str, known: Iterable[str]) -> str:
    if value in (known := list(known)):
        return value
    close = get_close_matches(value.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else "write one of them."
    raise ConfigError(f"`{short}` must be one of {_listed(known)}, but is {value!r}; {hint}")


def _check_counterparts(given: Mapping[str, Any]) -> None:
    for short, (long, nothing) in WITHOUT_COUNTERPART.items():
        if given.get(short, nothing) != nothing:
            raise ConfigError(
                f"`{short}` ({long}) is {given[short]!r}, but shardrun prepare has nothing like it; "
                "leave it out."
            )


def _check_said_once(
    given: Mapping[str, Any], source: Mapping[str, str], own: Mapping[str, str]
) -> None:
    """A word of prepare's would leave a flag without effect."""
    keys = {_KEYS[short]: short for short in given if short in _KEYS} | dict.fromkeys(source, "-c")
    for key in own:
        if key in keys:
            raise ConfigError(f"`{key}` is said by {keys[key]} as well; keep one of them.")


# ------------------------------------------------------------------------------------ what they say


def _settings(given: Mapping[str, Any], approach: Approach) -> dict[str, str]:
    """The value of every flag of FLAGS, as given, as the approach has it, or Golden Stick's default."""
    settings: dict[str, str] = {}
    for flag in FLAGS:
        value = _choose(flag.short, given.get(flag.short, flag.default), flag.values)
        if approach.fixed is not None and flag.needs is None:
            fixed = approach.fixed.get(flag.short, flag.default)
            if flag.short in given and value != fixed:
                raise ConfigError(
                    f"`{flag.short}` must be {fixed} with -q {given['-q']}, but is {value!r}; leave it "
                    "out, or write -q ptq."
                )
            value = fixed
        if flag.needs and settings[flag.needs] == "none" and value != flag.default:
            raise ConfigError(
                f"`{flag.short}` is {value!r}, which has no effect while {flag.needs} is none; "
                f"leave it out, or set {flag.needs}."
            )
        settings[flag.short] = value
    return settings


def _fields(settings: Mapping[str, str], approach: Approach) -> dict[str, str]:
    """What the preset leaves open. Granularities always: their defaults are not shardrun's."""
    said = [
        flag
        for flag in FLAGS
        if (approach.fixed is None if flag.needs is None else settings[flag.needs] != "none")
    ]
    values = {f"quant.{flag.field}": settings[flag.short] for flag in said}
    return {key: "null" if value in ("none", "0") else value for key, value in values.items()}


def _left_out(
    modules: list[str], approach: Approach, settings: Mapping[str, str]
) -> dict[str, str]:
    """`-b`, whose MindFormers names `quant` translates."""
    if settings["-w"] == "none":
        if modules:
            raise ConfigError(
                f"`-b` is {' '.join(modules)!r}, which has no effect while no weight is quantized "
                "(-w is none); leave it out."
            )
        return {}
    patterns = dict.fromkeys([*approach.left_out, *modules])
    return {"quant.modules_to_not_convert": f"[{','.join(map(_quoted, patterns))}]"}


def _quoted(text: str) -> str:
    """By Hydra's rules: a quote gets a backslash, and backslashes before a quote are doubled."""
    text = re.sub(r'(\\*)"', r'\1\1\\"', text)
    return '"' + re.sub(r"(\\+)\Z", r"\1\1", text) + '"'


def _data(given: Mapping[str, Any], settings: Mapping[str, str]) -> dict[str, str]:
    """`-s`, if it is what -t says it is."""
    path, kind = given.get("-s"), given.get("-t")
    is_jsonl = None if kind is None else DATASETS[_choose("-t", kind, DATASETS)]
    if path is None:
        if kind is not None:
            raise ConfigError(f"`-t` is {kind}, but there is no -s; give the file, or drop -t.")
        return {}
    if given["-q"] == "rtn-a16w8":
        raise ConfigError("`-s` has no effect on -q rtn-a16w8, which is not calibrated; drop it.")
    if is_jsonl is not None and is_jsonl != path.endswith(".jsonl"):
        rule = "end in .jsonl" if is_jsonl else "be plain text, not .jsonl"
        raise ConfigError(f"`-s` must {rule} with -t {kind}, but is {path!r}; correct one of them.")
    return {"calibration.data": path}


# ------------------------------------------------------------------------------- names and the files


def _source(path: str, own: Mapping[str, str]) -> tuple[dict[str, str], str, str]:
    """The words of -c, the directory of the outputs, and the model's name."""
    if Path(path).is_dir():
        return {"checkpoint": path}, "output", Path(path).resolve().name
    with redirect_stderr(io.StringIO()):  # prepare reads it again, and says what is not used
        keys = read_config_file(Path(path))
    _check_unquantized(path, keys)
    checkpoint = own.get("checkpoint") or keys.get("checkpoint")
    if not checkpoint:
        raise ConfigError(
            f"`-c` {path} names no checkpoint; set load_checkpoint in it, or add checkpoint=DIRECTORY."
        )
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    trainer = values.get("trainer")
    model = trainer.get("model_name") if isinstance(trainer, dict) else None
    folder = values.get("output_dir") or "output"
    return {"config": path}, str(folder), Path(str(model or _model_of(checkpoint))).name


def _model_of(checkpoint: str) -> str:
    path = Path(checkpoint).resolve()
    return path.stem if path.is_file() else path.name


def _check_unquantized(path: str, keys: Mapping[str, Any]) -> None:
    """The flags say what is quantized; what the file says of it would be dropped."""
    for key, value in keys.items():
        is_scheme = key == "quant" or (key.startswith("quant.") and key.endswith("_dtype"))
        if is_scheme and value not in (None, "none"):
            raise ConfigError(
                f"`-c` {path} says `{key}` = {value!r}, but the flags say what is quantized; give the "
                "YAML of the original model."
            )


def _name(model: str, approach: str, settings: Mapping[str, str]) -> str:
    """Golden Stick's name: llama2_13b_rtn-a16w8_ckpt, llama2_13b_ptq_smooth_a8w8c8_ckpt."""
    if approach != "ptq":
        return f"{model}_{approach}_ckpt"
    suppression = "no_smooth" if settings["-o"] == "none" else settings["-o"]
    recovery = "" if settings["-p"] == "none" else "_gptq"
    activations = {"none": "a16", "int8": "a8"}[settings["-a"]]
    if settings["-ag"] == "per_token":
        activations += "dyn"
    weights = {"none": "w16", "int8": "w8", "int4": "w4"}[settings["-w"]]
    cache = "" if settings["-k"] == "none" else "c8"
    return f"{model}_ptq_{suppression}{recovery}_{activations}{weights}{cache}_ckpt"


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
