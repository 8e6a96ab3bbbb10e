"""A MindFormers predict YAML as shardrun's keys.

Every key of the file becomes one of ours, or is named on stderr with the reason why it is not used,
or is refused; none is swallowed. A blank value says nothing, and a key that the file leaves out has
shardrun's default.

The shape in `model.model_config` becomes `model.*`: `plan`, and checkpoints without a config.json,
have no other source. Beside a config.json equal values change nothing, and a contradiction stops at
the first weight that does not fit, where MindFormers would log it and print garbage.

What the checkpoint itself may say as well (the rest of a config.json, the tokenizer) is kept apart:
launcher/completion.py looks at both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.environment.worker import Claim
from launcher.failures import ConfigError
from launcher.mindformers.model import take_model
from launcher.mindformers.run import take_checkpoint, take_context, take_parallel
from launcher.schema import GROUPS, keys
from parallel.checkpoint.mindformers.directory import describe_model
from parallel.checkpoint.mindformers.file import TRAINING, ReadFile, check_absent, is_blank

# Keys that only their files have at the top level.
_MARKS = frozenset({
    "auto_trans_ckpt", "context", "load_checkpoint", "parallel_config", "processor", "run_mode",
    "runner_config", "trainer", "use_parallel",
})  # fmt: skip


def is_mindformers(values: Mapping[str, Any]) -> bool:
    """Whether a parsed YAML file is MindFormers'."""
    model = values.get("model")
    return bool(_MARKS & values.keys()) or (isinstance(model, dict) and "model_config" in model)


@dataclass(frozen=True)
class PredictFile:
    """A predict YAML that was read.

    Attributes:
        file: what became of its keys.
        model: all that it says of the model, by config.json's names and with MindFormers' defaults:
            for a checkpoint that does not say it itself. Empty where it says nothing.
        tokenizers: the files of the tokenizer that it names, by its key, the best first.
    """

    file: ReadFile
    model: Mapping[str, Any]
    tokenizers: Mapping[str, str]


def translate(values: Mapping[str, Any], source: str, claim: Claim | None = None) -> PredictFile:
    """A parsed predict YAML by our keys.

    Args:
        source: what to call the file.
        claim: what the launcher says of the number of ranks.

    Raises:
        ConfigError: a key or value that would change the text and cannot be honoured.
    """
    file = ReadFile(source, ConfigError)
    model = file.mapping("model", values.get("model"))
    model_config = file.mapping("model.model_config", model.get("model_config"))
    take_checkpoint(file, values, model_config)
    take_parallel(file, values, claim)
    take_context(file, file.mapping("context", values.get("context")))
    take_model(file, model, model_config)
    _take_rest(file, values)
    described = ReadFile(source, ConfigError)
    whole = describe_model(described, model, model_config) if model_config else {}
    return PredictFile(file, whole, _tokenizers(file, values))


_READ = (
    "context", "load_checkpoint", "model", "parallel_config", "pretrained_model_dir",
    "use_parallel",
)  # fmt: skip
_UNUSED_KEYS = {
    "any checkpoint is sharded as it is read": "auto_trans_ckpt src_strategy_path_or_dir "
    "load_ckpt_format load_ckpt_async remove_redundancy transform_process_num only_save_strategy",
    "the task is shardrun's first argument": "run_mode do_eval",
    "results go to run_root": "output_dir remote_save_url",
    "the shape is model.model_config's": "trainer",
    "the tokenizer's own files say it": "processor",
    TRAINING: "auto_tune autotune_per_step callbacks data_skip_steps eval_callbacks eval_dataset "
    "eval_dataset_task eval_epoch_interval eval_step_interval filepath_prefix ignore_data_skip "
    "init_start_profile layer_decay layer_scale lr_scale_factor lr_schedule metric "
    "micro_batch_interleave_num monitor_config optimizer parallel recompute_config resume_training "
    "runner_config runner_wrapper swap_config train_dataset train_dataset_task",
}
_TOP_REASONS = {key: why for why, names in _UNUSED_KEYS.items() for key in names.split()}


def _take_rest(file: ReadFile, values: Mapping[str, Any]) -> None:
    ours = {*(key for key, _ in keys()), *GROUPS}
    for key, value in values.items():
        if key in _READ or is_blank(value):
            continue
        if key == "seed":
            file.values["generation.seed"] = value
        elif key == "moe_config":
            check_absent(file, key, value)
        elif key in _TOP_REASONS or key.startswith("profile"):
            file.ignore(_TOP_REASONS.get(key, TRAINING), {key: value})
        elif key in ours:
            hint = f"write {key}=… on the command line."
            raise ConfigError(f"`{key}` is no key of MindFormers, as {file.source} is; {hint}")
        else:
            file.ignore("not known", {key: value})


def _tokenizers(file: ReadFile, values: Mapping[str, Any]) -> dict[str, str]:
    section = "processor.tokenizer"
    tokenizer = file.mapping(
        section, file.mapping("processor", values.get("processor")).get("tokenizer")
    )
    found = {}
    for key in ("tokenizer_file", "vocab_file"):
        if not is_blank(value := tokenizer.get(key)):
            if not isinstance(value, str):
                raise file.refusal(f"{section}.{key}", "must be a path", value, "correct it")
            found[f"{section}.{key}"] = value
    return found
