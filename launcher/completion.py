"""What a configuration leaves open, filled in from the YAML of MindFormers.

A YAML that is given by `config=` and one that lies beside the weights mean the same. What the checkpoint
itself says goes first: a config.json, a tokenizer beside the weights, integers in its files.
"""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import replace
from pathlib import Path

from launcher.config_file import ConfigFile
from launcher.mindformers.translation import PredictFile
from launcher.schema import Config, model_overrides
from launcher.tasks import TASKS, reads
from launcher.text import TOKENIZER_FILES
from parallel.checkpoint.config_values import says_model
from parallel.checkpoint.mindformers.directory import SPECIAL_TOKENS
from parallel.checkpoint.open import scheme_to_apply
from parallel.checkpoint.readers.mindformers.files import weights_directory

# They store the tensors as they are; what is computed in is for those who compute.
_KEEP_DTYPE = ("prepare", "export")


def complete(
    config: Config, typed: Container[str], file: ConfigFile
) -> tuple[Config, tuple[str, ...]]:
    """The configuration with what is filled in, and what to say about it.

    Args:
        typed: the keys of the command line, which nothing stands in for.
        file: of `config=`.

    Raises:
        CheckpointError: the directory of the checkpoint cannot be looked at.
    """
    directory = _directory(config)
    notes: tuple[str, ...] = ()
    if directory is not None and not any(key.startswith("quant") for key in file.values):
        config, notes = _with_scheme(config, typed, directory)
    if file.predict is not None:
        config = _with_model(config, typed, file.predict, directory)
        config = _with_tokenizer(config, file.predict, directory)
        notes += file.predict.file.report()
    return config, notes


def _directory(config: Config) -> Path | None:
    """Where the weights are; None: none are given, or they cannot be read, as others will say."""
    if config.checkpoint is None:
        return None
    directory = weights_directory(Path(config.checkpoint).absolute())
    is_readable = os.path.isdir(directory) and os.access(directory, os.R_OK | os.X_OK)
    return directory if is_readable else None


def _with_scheme(
    config: Config, typed: Container[str], directory: Path
) -> tuple[Config, tuple[str, ...]]:
    """Float weights are quantized as the YAML beside them asks."""
    if "quant" in typed or "quant" not in TASKS[config.task.name][1]:
        return config, ()
    asked = scheme_to_apply(directory)
    if asked is None or asked.scheme is None:
        return config, ()
    said = {
        key: value for key, value in asked.scheme.to_dict().items() if f"quant.{key}" not in typed
    }
    note = f"{asked.path} asks for {asked.scheme.label} (quant=none leaves the weights as they are)"
    return replace(config, quant=replace(config.quant, **said)), (note,)


def _with_model(
    config: Config, typed: Container[str], predict: PredictFile, directory: Path | None
) -> Config:
    """The YAML is the config.json of a checkpoint that has none, and of a shape without weights."""
    model, task = config.model, config.task.name
    if directory is not None and says_model(directory):
        if task in _KEEP_DTYPE and "model.torch_dtype" not in typed and model.torch_dtype:
            why = f"{task} keeps the checkpoint's dtype"
            predict.file.ignore(why, {"compute_dtype": model.torch_dtype})
            model = replace(model, torch_dtype=None)
        return replace(config, model=model)
    if directory is None and not model_overrides(config):
        return config
    said = {key: value for key, value in predict.model.items() if key in vars(model)}
    if isinstance(said.get("eos_token_id"), int):
        said["eos_token_id"] = [said["eos_token_id"]]
    said = {key: value for key, value in said.items() if getattr(model, key) is None}
    predict.file.use(*SPECIAL_TOKENS)
    return replace(config, model=replace(model, **said))


def _with_tokenizer(config: Config, predict: PredictFile, directory: Path | None) -> Config:
    """The one that the YAML names, where none is given and none lies beside the weights."""
    if not predict.tokenizers:
        return config
    found = [
        path
        for name in predict.tokenizers.values()
        for path in (Path(name).absolute(), Path(predict.file.source).absolute().parent / name)
        if os.path.exists(path)
    ]
    beside = [name for name in TOKENIZER_FILES if directory and (directory / name).exists()]
    if not reads(config.task.name, "tokenizer") or directory is None:
        why = "no text is read" if directory else "there are no weights"
    elif config.tokenizer is not None:
        why = f"{config.tokenizer} is given"
    elif beside:
        why = f"{beside[0]} lies beside the weights"
    elif not found:
        why = "there is no such file, here or beside the YAML"
    else:
        return replace(config, tokenizer=str(found[0]))
    predict.file.ignore(why, predict.tokenizers)
    return config
