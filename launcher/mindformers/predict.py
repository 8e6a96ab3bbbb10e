"""The arguments of MindFormers' run_llama2_predict.sh, then prompts: `shardrun generate` runs them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import MutableMapping, Sequence

from launcher.__main__ import main as run_command
from launcher.failures import EXIT_USER, USER_ERRORS, ConfigError, one_line
from launcher.hydra_list import hydra_list

NAME = "shardrun-predict"
USAGE = f"usage: {NAME} PARALLEL CONFIG_PATH CKPT_PATH [DEVICE_NUM] [PROMPT ...]"
HELP = f"""{USAGE}

  PARALLEL     single: one rank, whatever MS_* variables are set; parallel: DEVICE_NUM ranks
  CONFIG_PATH  a MindFormers predict YAML, or a shardrun YAML
  CKPT_PATH    the checkpoint
  DEVICE_NUM   parallel: the number of ranks, needed; single: may be left out, and is not used
  PROMPT       taken as it is; none: the three prompts of MindFormers' script

With single, a fourth argument that is empty or all digits is DEVICE_NUM, else the first PROMPT; a
PROMPT of digits needs a DEVICE_NUM before it."""
PROMPTS = ("I love Beijing, because", "LLaMA is a", "Huawei is a company that")


def main(argv: Sequence[str] | None = None) -> int:
    """Generate as a line of MindFormers' script asks for; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(HELP)
        return 0
    try:
        words = read_words(argv)
    except USER_ERRORS as error:
        print(f"{NAME}: {one_line(error)}\n{USAGE}", file=sys.stderr)
        return EXIT_USER
    if argv[0] == "single":
        _drop_mindspore_variables(os.environ)
    return run_command(words)


def read_words(argv: Sequence[str]) -> list[str]:
    """The command line of `shardrun` that a line of theirs stands for.

    Raises:
        ConfigError: an argument that is missing, or is not what it must be.
    """
    mode = argv[0] if argv else ""
    if mode not in ("single", "parallel"):
        raise ConfigError(
            f"PARALLEL must be single or parallel, but is {mode!r}; give one of them first."
        )
    if len(argv) < 3:
        raise ConfigError(f"{mode} needs CONFIG_PATH and CKPT_PATH; give both.")
    config, checkpoint, *rest = argv[1:]
    if not os.path.isfile(config):
        raise ConfigError(
            f"CONFIG_PATH must be a YAML file, but {config!r} is none; correct the path."
        )
    if not os.path.exists(checkpoint):
        raise ConfigError(f"CKPT_PATH must exist, but {checkpoint!r} does not; correct the path.")
    size, prompts = _single(rest) if mode == "single" else _parallel(rest)
    return [
        "generate",
        f"config={config}",
        f"checkpoint={checkpoint}",
        f"parallel.tp={size}",
        _prompt_word(prompts or PROMPTS),
    ]


def _single(rest: Sequence[str]) -> tuple[str, Sequence[str]]:
    has_device_num = bool(rest) and re.fullmatch("[0-9]*", rest[0]) is not None
    return "1", rest[1:] if has_device_num else rest


def _parallel(rest: Sequence[str]) -> tuple[str, Sequence[str]]:
    size = rest[0] if rest else ""
    if not re.fullmatch("[1-9][0-9]*", size):
        raise ConfigError(
            f"DEVICE_NUM must be a positive integer, but is {size!r}; parallel needs the number of "
            "ranks."
        )
    return size, rest[1:]


def _prompt_word(prompts: Sequence[str]) -> str:
    return f"prompt={prompts[0]}" if len(prompts) == 1 else f"prompts={hydra_list(prompts)}"


def _drop_mindspore_variables(environ: MutableMapping[str, str]) -> None:
    """A stale MS_WORKER_NUM in the shell must not turn a single run into a parallel one."""
    own = ("RANK_ID", "RANK_SIZE", "DEVICE_ID")
    dropped = sorted(name for name in environ if name.startswith("MS_") or name in own)
    for name in dropped:
        del environ[name]
    if dropped:
        print(f"{NAME}: single does not use {', '.join(dropped)}; dropped.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
