"""`model.model_config`: the shape of the model, and what else is written there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel.checkpoint.mindformers.file import (
    MUST_BE_ABSENT,
    RUNTIME,
    TRAINING,
    ReadFile,
    check_absent,
    is_blank,
    is_true,
)

# What the launcher takes of the same mapping (launcher/mindformers/generation.py).
SAMPLING = ("temperature", "top_k", "top_p")
LENGTHS = ("max_new_tokens", "max_length", "max_decode_length")
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
    "do_sample": "generation.do_sample",
    "repetition_penalty": "generation.repetition_penalty",
}
_DTYPES = ("compute_dtype", "param_init_type")
_SPECIAL = (
    "extend_method", "scaling_factor", "multiple_of", "ffn_dim_multiplier", "qkv_has_bias",
    "batch_size", "quantization_config", "checkpoint_name_or_path",
)  # fmt: skip
_UNUSED_MODEL_KEYS = {
    "the KV cache is sized by the prompts and answers": "seq_length block_size num_blocks",
    "the checkpoint says it": "bos_token_id eos_token_id pad_token_id ignore_token_id type "
    "model_type mindformers_version auto_map tokenizer_class pretrain_seqlen",
    "chosen by compute_dtype": "layernorm_compute_type softmax_compute_type rotary_dtype "
    "ln_param_init_type embedding_init_type residual_dtype res_dtype",
    RUNTIME: "use_past use_past_shard is_dynamic is_flexible_shape use_flash_attention "
    "use_paged_attention use_kvcache_op use_ring_attention use_attn_mask_compression "
    "use_rope_slice qkv_concat ffn_concat fused_rms_norm use_fused_rope use_fused_swiglu offset "
    "compute_in_2d llm_backend parallel_decoding_params return_dict input_sliced_sig",
    TRAINING: "parallel_config parallel_optimizer fine_grain_interleave pp_interleave_num "
    "emb_dropout_prob init_method_std rl_config",
}
_REASONS = {key: why for why, names in _UNUSED_MODEL_KEYS.items() for key in names.split()}


def take_shape(file: ReadFile, model: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """What is said of the model; an unknown key is refused, whatever it may be about.

    Args:
        model: the whole of `model`.
        config: its `model_config`.
    """
    known = {*_RENAMED, *_DTYPES, *SAMPLING, *LENGTHS, *MUST_BE_ABSENT, *_SPECIAL, *_REASONS}
    file.check_known("model.model_config", config, known)
    given = present(config)
    for key, value in given.items():
        if key in _RENAMED:
            file.values[_RENAMED[key]] = value
        elif key in MUST_BE_ABSENT:
            check_absent(file, f"model.model_config.{key}", value)
        elif key in _REASONS:
            file.ignore(_REASONS[key], {key: value})
    _take_dtype(file, given)
    _take_architecture(file, model, given)
    _take_ffn_width(file, given)
    _take_rope_scaling(file, given)


def present(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say something."""
    return {key: value for key, value in config.items() if not is_blank(value)}


def _take_dtype(file: ReadFile, given: Mapping[str, Any]) -> None:
    """The one that is computed in, as config.json says it: a CPU may take another for float16."""
    said = _of(given, *_DTYPES)
    if said:
        value = said.pop(next(iter(said)))
        file.values["model.torch_dtype"] = value.lower() if isinstance(value, str) else value
    file.ignore("tensors are read in the dtype of their files", said)


def _take_architecture(file: ReadFile, model: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Their one Llama class is several of Hugging Face's; the bias of q, k and v tells which."""
    name = file.mapping("model.arch", model.get("arch")).get("type")
    if is_blank(name):
        file.ignore("model.arch says no type", _of(given, "qkv_has_bias"))
    elif name in ("LlamaForCausalLM", "ParallelLlamaForCausalLM"):
        family = "Qwen2" if is_true(given.get("qkv_has_bias")) else "Llama"
        file.values["model.architectures"] = [f"{family}ForCausalLM"]
    else:
        rule = "must be LlamaForCausalLM or ParallelLlamaForCausalLM"
        remedy = "other families are not read from these files; leave config= out"
        raise file.refusal("model.arch.type", rule, name, remedy)
    others = [key for key in model if key not in ("model_config", "arch")]
    file.ignore("not known", {f"model.{key}": model[key] for key in others})


def _take_ffn_width(file: ReadFile, given: Mapping[str, Any]) -> None:
    """Their formula; its 0.01 is what makes 1.3 of a 70B, with multiple_of 256, Llama's 28672."""
    if "intermediate_size" in given or "hidden_size" not in given or "multiple_of" not in given:
        file.ignore(
            "intermediate_size is given, or hidden_size or multiple_of is not",
            _of(given, "multiple_of", "ffn_dim_multiplier"),
        )
        return
    section = "model.model_config."
    width = 4 * file.positive(section + "hidden_size", given["hidden_size"])
    unit = file.positive(section + "multiple_of", given["multiple_of"])
    if "ffn_dim_multiplier" in given:
        factor = given["ffn_dim_multiplier"]
        factor = file.positive(section + "ffn_dim_multiplier", factor, (int, float))
        width = int((factor + 0.01) * width)
    file.values["model.intermediate_size"] = -(-int(2 * width / 3) // unit) * unit


def _of(given: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: given[key] for key in keys if key in given}


def _take_rope_scaling(file: ReadFile, given: Mapping[str, Any]) -> None:
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
