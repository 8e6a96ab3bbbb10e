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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from launcher.failures import ConfigError
from launcher.schema import GROUPS, QuantSection, keys

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
    file = _File(source)
    model = file.mapping("model", values.get("model"))
    model_config = file.mapping("model.model_config", model.get("model_config"))
    _take_checkpoint(file, values, model_config)
    _take_parallel(file, values)
    _take_context(file, file.mapping("context", values.get("context")))
    _take_model(file, model, model_config)
    _take_rest(file, values)
    if file.unused:
        print(f"shardrun: {source} (MindFormers): not used: {file.report()}", file=sys.stderr)
    return file.values


@dataclass
class _File:
    """What was read so far: our keys, and theirs that are not used, by reason."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)

    def ignore(self, reason: str, *names: str) -> None:
        if names:
            self.unused.setdefault(reason, []).extend(names)

    def report(self) -> str:
        """What a reader may have counted on comes first."""
        reasons = sorted(self.unused, key=lambda why: why in (_TRAINING, _RUNTIME))
        return "; ".join(f"{', '.join(self.unused[why])} ({why})" for why in reasons)

    def refusal(self, key: str, rule: str, value: object, remedy: str) -> ConfigError:
        return ConfigError(f"`{key}` in {self.source} {rule}, but is {value!r}; {remedy}.")

    def mapping(self, key: str, value: Any) -> dict[str, Any]:
        if _is_blank(value):
            return {}
        if not isinstance(value, dict):
            raise self.refusal(key, "must be a mapping", value, "correct the indentation below it")
        return value

    def positive(self, key: str, value: Any, kinds: tuple[type, ...] = (int,)) -> Any:
        if type(value) not in kinds or not 0 < value < float("inf"):
            word = "integer" if kinds == (int,) else "number"
            raise self.refusal(key, f"must be a positive {word}", value, "correct it")
        return value

    def check_known(self, section: str, names: Iterable[Any], known: Iterable[str]) -> None:
        """They would swallow an unknown key, and with it what its user wanted."""
        known = sorted(known)
        for name in names:
            if name not in known:
                close = get_close_matches(str(name), known, n=1)
                hint = f"did you mean `{close[0]}`?" if close else "remove it."
                raise ConfigError(f"`{section}.{name}` in {self.source} is not a key; {hint}")


def _is_blank(value: Any) -> bool:
    """An unquoted None of theirs is the string "None" to YAML."""
    blank = ("", "none", "null")
    return value is None or (isinstance(value, str) and value.strip().lower() in blank)


def _is_true(value: Any) -> bool:
    return str(value).lower() == "true"


# ------------------------------------------------------------------- checkpoint, ranks and device


def _take_checkpoint(
    file: _File, values: Mapping[str, Any], model_config: Mapping[str, Any]
) -> None:
    name = model_config.get("checkpoint_name_or_path")
    named = {
        "load_checkpoint": values.get("load_checkpoint"),
        "pretrained_model_dir": values.get("pretrained_model_dir"),
        "model.model_config.checkpoint_name_or_path": name if "/" in str(name) else None,
    }
    given = {key: path for key, path in named.items() if not _is_blank(path)}
    for key, path in given.items():
        if "checkpoint" not in file.values:
            file.values["checkpoint"] = path
        elif path != file.values["checkpoint"]:
            file.ignore("another key names the checkpoint", key)
    if not _is_blank(name) and "/" not in str(name):
        file.ignore("nothing is downloaded", "model.model_config.checkpoint_name_or_path")


def _take_parallel(file: _File, values: Mapping[str, Any]) -> None:
    """Their shipped files carry sizes beside `use_parallel: False`, which then mean nothing."""
    config = file.mapping("parallel_config", values.get("parallel_config"))
    for key, value in config.items():
        name = f"parallel_config.{key}"
        if key == "vocab_emb_dp":
            file.values["parallel.vocab_emb_dp"] = value
        elif key not in ("model_parallel", "data_parallel", "pipeline_stage"):
            file.ignore(_TRAINING, name)
        elif not _is_true(values.get("use_parallel")):
            file.ignore("use_parallel is not True, so parallel.tp is open", name)
        elif key == "model_parallel":
            file.values["parallel.tp"] = value
        elif value != 1:
            raise file.refusal(name, "must be 1", value, "set it to 1: only model_parallel is run")


def _take_context(file: _File, context: Mapping[str, Any]) -> None:
    devices = {"Ascend": None, "GPU": "cuda", "CPU": "cpu"}
    for key, value in context.items():
        if key == "max_device_memory":
            file.ignore("there is no limit; shardrun plan says what is needed", f"context.{key}")
        elif key != "device_target":
            file.ignore(_RUNTIME, f"context.{key}")
        elif value not in devices:
            rule = f"must be one of {', '.join(devices)}"
            raise file.refusal(f"context.{key}", rule, value, "correct it")
        elif devices[value] is None:
            file.ignore("device=auto is used instead", f"context.{key} {value}")
        else:
            file.values["device"] = devices[value]


# ----------------------------------------------------------------------------- model and generation

_RENAMED = {
    "hidden_size": "model.hidden_size",
    "intermediate_size": "model.intermediate_size",
    "num_layers": "model.num_hidden_layers",
    "num_heads": "model.num_attention_heads",
    "n_kv_heads": "model.num_key_value_heads",
    "vocab_size": "model.vocab_size",
    "max_position_embedding": "model.max_position_embeddings",
    "max_position_embeddings": "model.max_position_embeddings",
    "rms_norm_eps": "model.rms_norm_eps",
    "theta": "model.rope_theta",
    "tie_word_embeddings": "model.tie_word_embeddings",
    "param_init_type": "model.torch_dtype",
    "compute_dtype": "dtype",
    "do_sample": "generation.do_sample",
    "repetition_penalty": "generation.repetition_penalty",
}
_SAMPLING = ("temperature", "top_k", "top_p")
_LENGTHS = ("max_new_tokens", "max_length", "max_decode_length")
_MUST_BE_ABSENT = {
    "pet_config": "merge the adapter into the weights first",
    "quant": "write a quantization_config",
    "quant_config": "write a quantization_config",
    "moe_config": "mixtures of experts are not run; remove it for a dense model",
}
_SPECIAL = (
    "extend_method", "scaling_factor", "multiple_of", "ffn_dim_multiplier", "qkv_has_bias",
    "batch_size", "quantization_config", "checkpoint_name_or_path",
)  # fmt: skip
_TRAINING = "training"
_RUNTIME = "how MindSpore runs it"
_UNUSED_MODEL_KEYS = {
    "the KV cache is sized by the prompts and answers": "seq_length block_size num_blocks",
    "the checkpoint says it": "bos_token_id eos_token_id pad_token_id ignore_token_id type "
    "model_type mindformers_version auto_map tokenizer_class pretrain_seqlen",
    "chosen by compute_dtype": "layernorm_compute_type softmax_compute_type rotary_dtype "
    "ln_param_init_type embedding_init_type residual_dtype res_dtype",
    _RUNTIME: "use_past use_past_shard is_dynamic is_flexible_shape use_flash_attention "
    "use_paged_attention use_kvcache_op use_ring_attention use_attn_mask_compression "
    "use_rope_slice qkv_concat ffn_concat fused_rms_norm use_fused_rope use_fused_swiglu offset "
    "compute_in_2d llm_backend parallel_decoding_params return_dict input_sliced_sig",
    _TRAINING: "parallel_config parallel_optimizer fine_grain_interleave pp_interleave_num "
    "emb_dropout_prob init_method_std rl_config",
}
_REASONS = {key: why for why, names in _UNUSED_MODEL_KEYS.items() for key in names.split()}


def _take_model(file: _File, model: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    known = {*_RENAMED, *_SAMPLING, *_LENGTHS, *_MUST_BE_ABSENT, *_SPECIAL, *_REASONS}
    file.check_known("model.model_config", config, known)
    given = {key: value for key, value in config.items() if not _is_blank(value)}
    for key, value in given.items():
        if key in _RENAMED:
            file.values[_RENAMED[key]] = value
        elif key in _MUST_BE_ABSENT:
            _check_absent(file, f"model.model_config.{key}", value)
        elif key in _REASONS:
            file.ignore(_REASONS[key], key)
    _take_architecture(file, model, given)
    _take_ffn_width(file, given)
    _take_rope_scaling(file, given)
    _take_generation(file, given)
    _take_quantization(file, config.get("quantization_config"))


def _check_absent(file: _File, name: str, value: Any) -> None:
    """What would change the text. `moe_config: {expert_num: 1}` is everywhere and does not."""
    key = name.rpartition(".")[2]
    is_dense = key == "moe_config" and file.mapping(name, value).get("expert_num", 1) == 1
    if value != {} and not is_dense:
        raise file.refusal(name, "must be absent", value, _MUST_BE_ABSENT[key])
    file.ignore(_TRAINING, name)


def _take_architecture(file: _File, model: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Their one Llama class is several of Hugging Face's; the bias of q, k and v tells which."""
    name = file.mapping("model.arch", model.get("arch")).get("type")
    if _is_blank(name):
        file.ignore("model.arch says no type", *(key for key in given if key == "qkv_has_bias"))
    elif name in ("LlamaForCausalLM", "ParallelLlamaForCausalLM"):
        family = "Qwen2" if _is_true(given.get("qkv_has_bias")) else "Llama"
        file.values["model.architectures"] = [f"{family}ForCausalLM"]
    else:
        rule = "must be LlamaForCausalLM or ParallelLlamaForCausalLM"
        remedy = "other families are not read from these files; leave config= out"
        raise file.refusal("model.arch.type", rule, name, remedy)
    others = [key for key in model if key not in ("model_config", "arch")]
    file.ignore("not known", *(f"model.{key}" for key in others))


def _take_ffn_width(file: _File, given: Mapping[str, Any]) -> None:
    """Their formula; its 0.01 is what makes 1.3 of a 70B, with multiple_of 256, Llama's 28672."""
    present = [key for key in ("multiple_of", "ffn_dim_multiplier") if key in given]
    if "intermediate_size" in given or "hidden_size" not in given or "multiple_of" not in given:
        file.ignore("intermediate_size is given, or hidden_size or multiple_of is not", *present)
        return
    section = "model.model_config."
    width = 4 * file.positive(section + "hidden_size", given["hidden_size"])
    unit = file.positive(section + "multiple_of", given["multiple_of"])
    if "ffn_dim_multiplier" in given:
        factor = given["ffn_dim_multiplier"]
        factor = file.positive(section + "ffn_dim_multiplier", factor, (int, float))
        width = int((factor + 0.01) * width)
    file.values["model.intermediate_size"] = -(-int(2 * width / 3) // unit) * unit


def _take_rope_scaling(file: _File, given: Mapping[str, Any]) -> None:
    """LLAMA3 is Hugging Face's llama3, number by number; the others differ from theirs."""
    method, factor = given.get("extend_method"), given.get("scaling_factor", 1)
    if method is None and factor != 1:
        rule, remedy = "must be 1.0 without an extend_method", "set it, or leave both out"
        raise file.refusal("model.model_config.scaling_factor", rule, factor, remedy)
    if method == "LLAMA3" and isinstance(factor, dict):
        file.values["model.rope_scaling"] = {"rope_type": "llama3", **factor}
    elif method is not None:
        raise file.refusal(
            "model.model_config.extend_method",
            "must be 'None', or 'LLAMA3' with a mapping as scaling_factor",
            method,
            "set it to 'None' and let the checkpoint's config.json say rope_scaling",
        )


def _take_generation(file: _File, given: Mapping[str, Any]) -> None:
    sampling = [key for key in _SAMPLING if key in given]
    if _is_true(given.get("do_sample")):
        file.values |= {f"generation.{key}": given[key] for key in sampling}
    elif sampling:
        # Set in every shipped file beside `do_sample: False`; ours would be refused as ineffective.
        file.ignore("do_sample is not True", *sampling)
    # Their order of precedence: new tokens, then either name of the length with the prompt.
    lengths = [key for key in _LENGTHS if key in given]
    if lengths:
        ours = "max_new_tokens" if lengths[0] == "max_new_tokens" else "max_length"
        file.values[f"generation.{ours}"] = given[lengths[0]]
    if lengths[1:]:
        file.ignore(f"{lengths[0]} is given", *lengths[1:])
    batch_size = file.positive("model.model_config.batch_size", given.get("batch_size", 1))
    if batch_size > 1:
        file.values["generation.max_num_seqs"] = batch_size
    elif "batch_size" in given:
        file.ignore("prompts run together, up to generation.max_num_seqs", "batch_size")


# ------------------------------------------------------------------------------------ quantization

_QUANT_KEYS = tuple(item.name for item in fields(QuantSection))
_EMPTY: Mapping[str, Any] = {
    "modules_to_not_convert": [], "algorithm_args": {}, "layer_policies": [],
}  # fmt: skip
# Their defaults differ from ours, and with them the numbers.
_GRANULARITIES = {
    "act_quant_granularity": ("activation_dtype", "per_tensor"),
    "kvcache_quant_granularity": ("kvcache_dtype", "per_channel"),
}


def _take_quantization(file: _File, block: Any) -> None:
    """Values are passed on as they are: QuantScheme refuses `int-8`, which theirs reads as None."""
    section = "model.model_config.quantization_config"
    given = file.mapping(section, block)
    file.check_known(section, given, _QUANT_KEYS)
    for key, (dtype, default) in _GRANULARITIES.items():
        if not _is_blank(given.get(dtype)) and _is_blank(given.get(key)):
            given = {**given, key: default}
    for key, value in given.items():
        if not _is_blank(value):
            # Their 0 is our null.
            file.values[f"quant.{key}"] = None if key == "group_size" and value == 0 else value
        elif not key.endswith("granularity"):
            file.values[f"quant.{key}"] = _EMPTY.get(key)


# ----------------------------------------------------------------------------------- the other keys

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
    _TRAINING: "auto_tune autotune_per_step callbacks data_skip_steps eval_callbacks eval_dataset "
    "eval_dataset_task eval_epoch_interval eval_step_interval filepath_prefix ignore_data_skip "
    "init_start_profile layer_decay layer_scale lr_scale_factor lr_schedule metric "
    "micro_batch_interleave_num monitor_config optimizer parallel recompute_config resume_training "
    "runner_config runner_wrapper swap_config train_dataset train_dataset_task",
}
_TOP_REASONS = {key: why for why, names in _UNUSED_KEYS.items() for key in names.split()}


def _take_rest(file: _File, values: Mapping[str, Any]) -> None:
    ours = {*(key for key, _ in keys()), *GROUPS}
    for key, value in values.items():
        if key in _READ or _is_blank(value):
            continue
        if key == "seed":
            file.values["generation.seed"] = value
        elif key == "moe_config":
            _check_absent(file, key, value)
        elif key in _TOP_REASONS or key.startswith("profile"):
            file.ignore(_TOP_REASONS.get(key, _TRAINING), *_names(file, key, value))
        elif key in ours:
            hint = f"write {key}=… on the command line."
            raise ConfigError(f"`{key}` is no key of MindFormers, as {file.source} is; {hint}")
        else:
            file.ignore("not known", key)


def _names(file: _File, key: str, value: Any) -> list[str]:
    """A vocab_file is named apart: who set it should see that another tokenizer is read."""
    if key != "processor":
        return [key]
    tokenizer = file.mapping("processor.tokenizer", file.mapping(key, value).get("tokenizer"))
    vocab_file = tokenizer.get("vocab_file")
    return [key] if _is_blank(vocab_file) else [key, "processor.tokenizer.vocab_file"]
