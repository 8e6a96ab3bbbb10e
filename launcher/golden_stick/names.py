"""The checkpoint that -c stands for, and the name of what is written."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import yaml

from launcher.config_file import read_config_file
from launcher.failures import ConfigError


def source_words(path: str, own: Mapping[str, str]) -> tuple[dict[str, str], str, str]:
    """The words of -c, the directory of the outputs, and the model's name."""
    if os.path.isdir(path):
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
    return path.stem if os.path.isfile(path) else path.name


def _check_unquantized(path: str, keys: Mapping[str, Any]) -> None:
    """The flags say what is quantized; what the file says of it would be dropped."""
    for key, value in keys.items():
        is_scheme = key == "quant" or (key.startswith("quant.") and key.endswith("_dtype"))
        if is_scheme and value not in (None, "none"):
            raise ConfigError(
                f"`-c` {path} says `{key}` = {value!r}, but the flags say what is quantized; give the "
                "YAML of the original model."
            )


def output_name(approach: str, settings: Mapping[str, str]) -> str:
    """Golden Stick's name of what is written, behind the model's: rtn-a16w8_ckpt,
    ptq_smooth_a8w8c8_ckpt."""
    if approach != "ptq":
        return f"{approach}_ckpt"
    suppression = "no_smooth" if settings["-o"] == "none" else settings["-o"]
    recovery = "" if settings["-p"] == "none" else "_gptq"
    activations = {"none": "a16", "int8": "a8"}[settings["-a"]]
    if settings["-ag"] == "per_token":
        activations += "dyn"
    weights = {"none": "w16", "int8": "w8", "int4": "w4"}[settings["-w"]]
    cache = "" if settings["-k"] == "none" else "c8"
    return f"ptq_{suppression}{recovery}_{activations}{weights}{cache}_ckpt"
