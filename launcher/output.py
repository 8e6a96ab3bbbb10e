"""The directory that `prepare` and `export` write."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from launcher.failures import ConfigError
from launcher.job import tokenizer_path
from launcher.schema import Config
from launcher.text import open_tokenizer

# Each works on a tensor of its own: memory is bounded by so many of them, not by the cores.
_MOST_THREADS = 8


def new_directory(config: Config) -> Path:
    """The path of `output`, in which nothing stands yet.

    Raises:
        ConfigError: no output is named, it exists, or another dtype than the checkpoint's is asked for.
        CheckpointError: the tokenizer that is to lie in it cannot be read.
    """
    task = config.task.name
    if config.output is None:
        raise ConfigError(f"{task} needs `output`; write output=DIRECTORY.")
    if config.dtype != "auto":
        raise ConfigError(
            f"`dtype` must be auto for {task}, which keeps the checkpoint's dtype, but is "
            f"{config.dtype}; give dtype to generate."
        )
    output = Path(config.output).absolute()
    if os.path.lexists(output):
        raise ConfigError(f"`output` {output} exists already; choose another or remove it.")
    _check_name(output)
    if (tokenizer := tokenizer_path(config)) is not None:
        open_tokenizer(tokenizer)
    return output


def calibration_path(output: Path) -> Path:
    """Where a calibration for `output` is kept until it is written."""
    return output.with_name(f".{output.name}.calibration")


def _check_name(output: Path) -> None:
    """Beside it stands what is unfinished, under a name that is longer."""
    try:
        calibration_path(output).lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(
                f"`output` {output.name[:40]}… must have a shorter name, as names beside it begin "
                f"with it, but has {len(output.name)} characters; choose another."
            ) from error


def num_writers() -> int:
    """How many tensors are worked on at a time."""
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))
