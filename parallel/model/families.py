"""The families of models that can be run, as data: what sets each apart from Llama.

Adding a family that is Llama with other biases is one row here and one parity test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What `config.json` does not say about an architecture.

    Attributes:
        qkv_bias, o_bias, mlp_bias: True, False, or None where a key of `config.json` says.
        sliding_window_key: the key that must be true for `sliding_window` to have a meaning, or
            None where `sliding_window` has one by itself.
    """

    qkv_bias: bool | None
    o_bias: bool | None
    mlp_bias: bool | None
    sliding_window_key: str | None = None


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(qkv_bias=None, o_bias=None, mlp_bias=None),
    "MistralForCausalLM": Family(qkv_bias=False, o_bias=False, mlp_bias=False),
    "Qwen2ForCausalLM": Family(
        qkv_bias=True, o_bias=False, mlp_bias=False, sliding_window_key="use_sliding_window"
    ),
}

# Tensors that old checkpoints carry and every loader computes anew.
DROPPED_SUFFIXES = (".rotary_emb.inv_freq",)
