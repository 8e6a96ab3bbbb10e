"""MindFormers' checkpoints by Hugging Face's names: whole, by rank, fused, with a strategy file."""

from __future__ import annotations

import pytest

from parallel.checkpoint.readers.mindformers_names import (
    hf_modules,
    hf_names,
    is_mindformers_name,
    mindformers_name,
)

NAMES = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "model.layers.3.self_attn.q_proj.weight": "model.layers.3.attention.wq.weight",
    "model.layers.3.self_attn.k_proj.bias": "model.layers.3.attention.wk.bias",
    "model.layers.3.self_attn.v_proj.weight": "model.layers.3.attention.wv.weight",
    "model.layers.13.self_attn.o_proj.weight": "model.layers.13.attention.wo.weight",
    "model.layers.13.mlp.gate_proj.weight": "model.layers.13.feed_forward.w1.weight",
    "model.layers.13.mlp.down_proj.weight": "model.layers.13.feed_forward.w2.weight",
    "model.layers.13.mlp.up_proj.weight": "model.layers.13.feed_forward.w3.weight",
    "model.layers.0.input_layernorm.weight": "model.layers.0.attention_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "model.layers.0.ffn_norm.weight",
    "model.norm.weight": "model.norm_out.weight",
    "lm_head.weight": "lm_head.weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_mapped_both_ways(name):
    assert mindformers_name(name) == NAMES[name]
    assert hf_names(NAMES[name]) == (name,)
    assert is_mindformers_name(NAMES[name]) == (name != "lm_head.weight")
    assert not is_mindformers_name(name)


def test_fused_names_stand_for_several():
    layer = "model.layers.7."
    assert hf_names(layer + "attention.w_qkv.bias") == tuple(
        f"{layer}self_attn.{letter}_proj.bias" for letter in "qkv"
    )
    assert hf_names(layer + "feed_forward.w_gate_hidden.weight") == (
        f"{layer}mlp.gate_proj.weight",
        f"{layer}mlp.up_proj.weight",
    )
    assert hf_modules(layer + "feed_forward.w_gate_hidden") == (
        f"{layer}mlp.gate_proj",
        f"{layer}mlp.up_proj",
    )


@pytest.mark.parametrize(
    "name",
    [
        "adam_m.model.norm_out.weight", "epoch_num", "model.layers.x.attention.wq.weight",
        "model.layers.0.attention.wq.scale", "model.layers.0.attention.wk_v.weight",
        "model.tok_embeddings.weight", "model.layers.0.self_attn.q_proj.weight", "weight", "",
    ],
)  # fmt: skip
def test_unknown_names_stay_unknown(name):
    assert hf_names(name) == ()
