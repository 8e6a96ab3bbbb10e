"""transformers' LlamaForCausalLM of a shape with random bfloat16 weights. Needs transformers, torch.

    python scripts/peers/transformers_bf16.py '{"hidden_size": 5120, …}' THREADS PROMPTS NEW_TOKENS

Prints one line of JSON: tokens/s of each prefill, and of a decode after the first prompt.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

_NAMES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta",
)  # fmt: skip


def build(shape: dict[str, Any]) -> Any:
    """A model that never was in float32; its own initialization would take minutes."""
    config = LlamaConfig(**{name: shape[name] for name in _NAMES})
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    block = (torch.rand((1 << 20) + 7) - 0.5) * (12 / shape["hidden_size"]) ** 0.5
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith("norm.weight"):
            parameter.fill_(1)
        else:
            flat = parameter.view(-1)
            for part in flat.split(block.numel()):
                part.copy_(block[: part.numel()])
    return model


@torch.inference_mode()
def measure(model: Any, prompts: list[int], new_tokens: int) -> dict[str, Any]:
    """Tokens/s of one run of each, after one that is not counted."""
    _run(model, prompts[0], 1)
    found = {str(length): length / _run(model, length, 0)[0] for length in prompts}
    return {"prefill": found, "decode": new_tokens / _run(model, prompts[0], new_tokens)[1]}


def _run(model: Any, length: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of a prefill and of the decode after it."""
    ids = torch.randint(model.config.vocab_size, (1, length))
    start = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    middle = time.perf_counter()
    for _ in range(new_tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    return middle - start, time.perf_counter() - middle


if __name__ == "__main__":
    shape, threads, prompts, new_tokens = (json.loads(word) for word in sys.argv[1:5])
    torch.set_num_threads(threads)
    print(json.dumps(measure(build(shape), prompts, new_tokens)))
