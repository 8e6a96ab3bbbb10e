"""The unquantized checkpoint that verify and eval hold a quantized one against."""

from __future__ import annotations

from pathlib import Path

from launcher.failures import ConfigError
from launcher.schema import Config, model_overrides
from parallel.checkpoint.open import Checkpoint, open_checkpoint
from parallel.checkpoint.readers.mindformers.files import weights_directory
from quant.scheme import QuantScheme


def named_original(config: Config) -> str | None:
    """What the task's key names as the unquantized checkpoint, if it has such a key."""
    named = {"verify": config.verify.original, "eval": config.eval.original}
    return named.get(config.task.name)


def check_original(config: Config, checkpoint: Checkpoint) -> Checkpoint | None:
    """The checkpoint that is named as the original; a task may need it last, and hours later."""
    name, key = named_original(config), f"{config.task.name}.original"
    if name is None:
        return None
    path = weights_directory(Path(name).absolute())
    original = open_checkpoint(path, model_overrides(config), key=key)
    if original.layout(QuantScheme()).scheme != QuantScheme():
        raise ConfigError(f"`{key}` must be unquantized, but {path} is not; give its source.")
    if original.config.vocab_size != checkpoint.config.vocab_size:
        raise ConfigError(
            f"`{key}` must have the checkpoint's vocab_size ({checkpoint.config.vocab_size}), but "
            f"{path} has {original.config.vocab_size}."
        )
    return original


def open_original(config: Config, checkpoint: Checkpoint) -> Checkpoint | None:
    """Where the unquantized weights are: where the task's key says, or in the source that is
    quantized here; None where nothing is quantized, or a prepared directory has no others."""
    name = named_original(config)
    if name is not None:
        return open_checkpoint(weights_directory(Path(name).absolute()), model_overrides(config))
    quantizes = config.quant.scheme() != QuantScheme()
    return checkpoint if quantizes and checkpoint.own_scheme is None else None
