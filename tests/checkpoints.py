"""Small random checkpoints in the layout of Hugging Face, made without transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

DEMO = Path(__file__).parents[1] / "launcher" / "demo"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json")

# The vocabulary is that of the demo's tokenizer; two kv heads, so that tp=4 replicates them.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_checkpoint(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    num_files: int = 1,
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """A random model of two layers with the demo's tokenizer; equal arguments give equal bytes.

    Args:
        path: the directory; it is made.
        num_files: above 1, the weights are dealt out to shards with an index.
        config_overrides: values of config.json in place of CONFIG's; None leaves the key out.
    """
    values = {**CONFIG, "torch_dtype": str(dtype).removeprefix("torch."), **config_overrides}
    config = {key: value for key, value in values.items() if value is not None}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO / name, path / name)
    write_weights(path, random_weights(config, dtype, seed), num_files)
    return path


def random_weights(config: dict[str, Any], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Every tensor that transformers would save for this config, by name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _random(name, shape, generator).to(dtype)
        for name, shape in tensor_shapes(config).items()
    }


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a Llama, Mistral or Qwen; written down apart from the product's."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    q_size, kv_size = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    family = config["architectures"][0].removesuffix("ForCausalLM")
    o_bias = family in ("Llama", "Qwen3") and config.get("attention_bias", False)
    qkv_bias = family == "Qwen2" or o_bias
    mlp_bias = family == "Llama" and config.get("mlp_bias", False)
    linears = {
        "self_attn.q_proj": (q_size, hidden, qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, qkv_bias),
        "self_attn.o_proj": (hidden, q_size, o_bias),
        "mlp.gate_proj": (ffn, hidden, mlp_bias),
        "mlp.up_proj": (ffn, hidden, mlp_bias),
        "mlp.down_proj": (hidden, ffn, mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if family == "Qwen3":
            shapes[prefix + "self_attn.q_norm.weight"] = (head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (head_dim,)
        for name, (out, into, has_bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (out, into)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (out,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def write_weights(path: Path, weights: dict[str, Tensor], num_files: int = 1) -> None:
    """`model.safetensors`, or that many shards and their index."""
    if num_files == 1:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{n + 1:05}-of-{num_files:05}.safetensors" for n in range(num_files)]
    names = sorted(weights)
    weight_map = {name: files[at * num_files // len(names)] for at, name in enumerate(names)}
    for file in files:
        held = {name: weights[name] for name in names if weight_map[name] == file}
        save_file(held, path / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Of a size at which logits neither vanish nor saturate; norms are near one."""
    if "norm" in name:
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    scale = shape[1] ** -0.5 if len(shape) == 2 and "embed" not in name else 0.5
    return scale * torch.randn(shape, generator=generator)
