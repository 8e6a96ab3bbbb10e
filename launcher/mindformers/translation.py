"""A MindFormers predict YAML as shardrun's keys.

Every key of the file becomes one of ours, or is named on stderr with the reason why it is not used,
or is refused; none is swallowed. A blank value says nothing, and a key that the file leaves out has
shardrun's default.

The shape in `model.model_config` becomes `model.*`: `plan`, and checkpoints without a config.json,
have no other source. Beside a config.json equal values change nothing, and a contradiction stops at
the first weight that does not fit, where MindFormers would log it and print garbage.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from launcher.failures import ConfigError
from launcher.mindformers.model import take_model
from launcher.mindformers.run import take_checkpoint, take_context, take_parallel
from launcher.schema import GROUPS, keys
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


def translate(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Our keys of a parsed predict YAML; one line on stderr names what is not used.

    Args:
        source: what to call the file.

    Raises:
        ConfigError: a key or value that would change the text and cannot be honoured.
    """
    file = ReadFile(source, ConfigError)
    model = file.mapping("model", values.get("model"))
    model_config = file.mapping("model.model_config", model.get("model_config"))
    take_checkpoint(file, values, model_config)
    take_parallel(file, values)
    take_context(file, file.mapping("context", values.get("context")))
    take_model(file, model, model_config)
    _take_rest(file, values)
    if file.unused:
        print(f"shardrun: {source} (MindFormers): not used: {file.report()}", file=sys.stderr)
    return file.values


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
    "the tokenizer of the checkpoint is used": "processor",
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
            file.ignore(_TOP_REASONS.get(key, TRAINING), *_names(file, key, value))
        elif key in ours:
            hint = f"write {key}=… on the command line."
            raise ConfigError(f"`{key}` is no key of MindFormers, as {file.source} is; {hint}")
        else:
            file.ignore("not known", key)


def _names(file: ReadFile, key: str, value: Any) -> list[str]:
    """A vocab_file is named apart: who set it should see that another tokenizer is read."""
    if key != "processor":
        return [key]
    tokenizer = file.mapping("processor.tokenizer", file.mapping(key, value).get("tokenizer"))
    vocab_file = tokenizer.get("vocab_file")
    return [key] if is_blank(vocab_file) else [key, "processor.tokenizer.vocab_file"]
