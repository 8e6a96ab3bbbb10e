"""Which checkpoint is run, on how many ranks, and on which device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.environment.worker import Claim
from parallel.checkpoint.mindformers.file import RUNTIME, TRAINING, ReadFile, is_blank, is_true

_DEVICES = {"ascend": "auto", "gpu": "cuda", "cpu": "cpu"}


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
            file.ignore("another key names the checkpoint", {key: path})
    if not is_blank(name) and "/" not in str(name):
        file.ignore("nothing is downloaded", {"model.model_config.checkpoint_name_or_path": name})


def take_parallel(file: ReadFile, values: Mapping[str, Any], claim: Claim | None) -> None:
    """Their shipped files carry sizes beside `use_parallel: False`, which then mean nothing.

    As in their predict script, what a launcher says goes before model_parallel, and there is one
    replica and one stage.
    """
    config = file.mapping("parallel_config", values.get("parallel_config"))
    for key, value in config.items():
        name = f"parallel_config.{key}"
        if key == "vocab_emb_dp":
            file.values["parallel.vocab_emb_dp"] = value
        elif key not in ("model_parallel", "data_parallel", "pipeline_stage"):
            file.ignore(TRAINING, {name: value})
        elif not is_true(values.get("use_parallel")):
            file.ignore("use_parallel is not True, so parallel.tp is open", {name: value})
        elif key != "model_parallel":
            if value != 1:
                file.ignore("model_parallel ranks are run, one replica of one stage", {name: value})
        elif claim is not None and value != claim.size:
            file.ignore(f"{claim.name} is {claim.size}, and goes before it", {name: value})
        else:
            file.values["parallel.tp"] = value


def take_context(file: ReadFile, context: Mapping[str, Any]) -> None:
    """Of `context` the device alone."""
    for key, value in context.items():
        given = {f"context.{key}": value}
        if key == "max_device_memory":
            file.ignore("there is no limit; shardrun plan says what is needed", given)
        elif key != "device_target":
            file.ignore(RUNTIME, given)
        elif (device := _DEVICES.get(str(value).lower())) is None:
            raise file.refusal(
                f"context.{key}", "must be one of Ascend, GPU, CPU", value, "correct it"
            )
        elif device == "auto":
            file.ignore("device=auto is used instead", given)
        else:
            file.values["device"] = device
