"""Which checkpoint is run, on how many ranks, and on which device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel.checkpoint.mindformers.file import RUNTIME, TRAINING, ReadFile, is_blank, is_true


def take_checkpoint(
    file: ReadFile, values: Mapping[str, Any], model_config: Mapping[str, Any]
) -> None:
    """One of several keys that name it; the first wins."""
    name = model_config.get("checkpoint_name_or_path")
    named = {
        "load_checkpoint": values.get("load_checkpoint"),
        "pretrained_model_dir": values.get("pretrained_model_dir"),
        "model.model_config.checkpoint_name_or_path": name if "/" in str(name) else None,
    }
    given = {key: path for key, path in named.items() if not is_blank(path)}
    for key, path in given.items():
        if "checkpoint" not in file.values:
            file.values["checkpoint"] = path
        elif path != file.values["checkpoint"]:
            file.ignore("another key names the checkpoint", key)
    if not is_blank(name) and "/" not in str(name):
        file.ignore("nothing is downloaded", "model.model_config.checkpoint_name_or_path")


def take_parallel(file: ReadFile, values: Mapping[str, Any]) -> None:
    """Their shipped files carry sizes beside `use_parallel: False`, which then mean nothing."""
    config = file.mapping("parallel_config", values.get("parallel_config"))
    for key, value in config.items():
        name = f"parallel_config.{key}"
        if key == "vocab_emb_dp":
            file.values["parallel.vocab_emb_dp"] = value
        elif key not in ("model_parallel", "data_parallel", "pipeline_stage"):
            file.ignore(TRAINING, name)
        elif not is_true(values.get("use_parallel")):
            file.ignore("use_parallel is not True, so parallel.tp is open", name)
        elif key == "model_parallel":
            file.values["parallel.tp"] = value
        elif value != 1:
            raise file.refusal(name, "must be 1", value, "set it to 1: only model_parallel is run")


def take_context(file: ReadFile, context: Mapping[str, Any]) -> None:
    """Of `context` the device alone."""
    devices = {"Ascend": None, "GPU": "cuda", "CPU": "cpu"}
    for key, value in context.items():
        if key == "max_device_memory":
            file.ignore("there is no limit; shardrun plan says what is needed", f"context.{key}")
        elif key != "device_target":
            file.ignore(RUNTIME, f"context.{key}")
        elif value not in devices:
            rule = f"must be one of {', '.join(devices)}"
            raise file.refusal(f"context.{key}", rule, value, "correct it")
        elif devices[value] is None:
            file.ignore("device=auto is used instead", f"context.{key} {value}")
        else:
            file.values["device"] = devices[value]
