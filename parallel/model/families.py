"""The families of models that can be run, as data: what sets each apart from Llama.

docs/families.md says how to add one: a row here, and a parity test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Window(Enum):
    """Which layers attend to the last `sliding_window` positions only."""

    NONE = "none of them"
    ALL = "all of them, unless it is null"
    BY_LAYER = "with use_sliding_window: those of layer_types, or from max_window_layers on"


@dataclass(frozen=True)
class Family:
    """What `config.json` does not say about an architecture.

    Attributes:
        qkv_bias, o_bias, mlp_bias: True, False, or None where a key of `config.json` says.
        qk_norm: each head of q and of k is normed before it is rotated.
        window: the layers with a sliding window.
        defaults: what transformers takes for a key that `config.json` leaves out, where that is not
            what it takes for Llama. (null is no such key: it stays null. num_key_value_heads is in
            every file; left out, for `plan` of a shape, it is the number of heads.)
    """

    qkv_bias: bool | None = None
    o_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    window: Window = Window.NONE
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QWEN = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        window=Window.ALL,
        defaults={"max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Family(
        qkv_bias=True, o_bias=False, mlp_bias=False, window=Window.BY_LAYER, defaults=_QWEN
    ),
    "Qwen3ForCausalLM": Family(
        mlp_bias=False, qk_norm=True, window=Window.BY_LAYER, defaults={**_QWEN, "head_dim": 128}
    ),
}

# Keys that change the arithmetic of some architecture, and the values, besides null, at which they
# change nothing. transformers passes most of them over in these families: whoever wrote one meant
# another model.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1.0,),
    "rotary_pct": (1.0,),
    "original_max_position_embeddings": (),
    "clip_qkv": (),
    "attention_multiplier": (),
    "attention_chunk_size": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "alibi": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
}

# Tensors that old checkpoints carry and every loader computes anew.
DROPPED_SUFFIXES = (".rotary_emb.inv_freq",)


def as_config_json(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of a model with what transformers, too, looks for in a config.json."""
    names = shape.get("architectures") or ["(none)"]
    kind = (
        {"model_type": names[0].removesuffix("ForCausalLM").lower()} if names[0] in FAMILIES else {}
    )
    return {**kind, **shape, "hidden_act": "silu"}
