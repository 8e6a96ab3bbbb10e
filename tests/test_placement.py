"""Placements: which slice of a tensor is whose."""

from __future__ import annotations

import pytest
import torch

from parallel.errors import ModelError
from parallel.model.config import ModelConfig, override_config
from parallel.model.placements import linear_modules, placement_table
from parallel.placement import Replicate, Split, SplitKVHeads, index_shape

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 515, "hidden_size": 64,
    "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip


def config(**overrides) -> ModelConfig:
    return ModelConfig.from_hf({**LLAMA, **overrides})


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("placement", [Split(0), Split(1), Split(0, 8), Split(1, 16)])
def test_slices_of_all_ranks_tile_the_tensor(placement, size):
    tensor = torch.arange(172 * 40).reshape(172, 40)
    parts = [tensor[placement.index((172, 40), rank, size)] for rank in range(size)]
    assert torch.equal(torch.cat(parts, dim=placement.dim), tensor)


def test_two_ranks_differ_by_one_unit_at_most():
    heights = [index_shape(Split(0).index((172, 4), rank, 8))[0] for rank in range(8)]
    assert sorted(set(heights)) == [21, 22]


def test_units_stay_together_and_the_last_may_be_short():
    cuts = [Split(0, 128).index((300,), rank, 2)[0] for rank in range(2)]
    assert cuts == [slice(0, 128), slice(128, 300)]


def test_more_ranks_than_units_leaves_some_without():
    sizes = [index_shape(Split(0).index((3,), rank, 8))[0] for rank in range(8)]
    assert sum(sizes) == 3
    assert max(sizes) == 1


@pytest.mark.parametrize(
    ("size", "expected"), [(2, [0, 2]), (4, [0, 1, 2, 3]), (8, [0, 0, 1, 1, 2, 2, 3, 3])]
)
def test_kv_heads_are_dealt_out_or_replicated(size, expected):
    placement = SplitKVHeads(0, 4)
    firsts = [placement.index((32, 5), rank, size)[0].start // 8 for rank in range(size)]
    assert firsts == expected


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_rank_holds_the_kv_heads_of_its_query_heads(tp):
    table = placement_table(config())
    for rank in range(tp):
        q = table["model.layers.0.self_attn.q_proj.weight"].index(rank, tp)[0]
        k = table["model.layers.0.self_attn.k_proj.weight"].index(rank, tp)[0]
        heads_of_q = {head // 2 for head in range(q.start // 8, q.stop // 8)}
        assert heads_of_q == set(range(k.start // 8, k.stop // 8))


def test_replicate_is_the_whole_tensor():
    assert Replicate().index((3, 4), 1, 2) == (slice(0, 3), slice(0, 4))


def test_row_parallel_bias_is_whole_and_column_parallel_bias_is_cut():
    table = placement_table(config(attention_bias=True, mlp_bias=True))
    assert index_shape(table["model.layers.0.mlp.down_proj.bias"].index(1, 2)) == (64,)
    assert index_shape(table["model.layers.0.mlp.up_proj.bias"].index(1, 2)) == (86,)


def test_lm_head_is_a_module_also_when_it_is_tied():
    assert "lm_head" in linear_modules(config(tie_word_embeddings=True))
    assert "lm_head.weight" not in placement_table(config(tie_word_embeddings=True))


def test_vocab_emb_dp_replicates_the_embedding_alone():
    table = placement_table(config(), vocab_emb_dp=True)
    assert table["model.embed_tokens.weight"].placement == Replicate()
    assert table["lm_head.weight"].placement == Split(0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "valid"),
    [(40, 40, (1, 2, 4, 5, 8, 10, 20, 40)), (40, 8, (1, 2, 4, 8, 40)), (8, 4, (1, 2, 4, 8))],
)
def test_valid_sizes_divide_the_heads(heads, kv_heads, valid):
    model = config(hidden_size=640, num_attention_heads=heads, num_key_value_heads=kv_heads)
    assert model.valid_tp_sizes() == valid


def test_size_that_does_not_divide_is_refused_with_the_valid_ones():
    with pytest.raises(ModelError, match="but is 3; valid sizes: 1, 2, 4, 8"):
        config().check_tp(3)


def test_rope_theta_beside_rope_parameters_is_read():
    model = config(rope_theta=1e6, rope_parameters={"rope_type": "default"})
    assert model.rope_theta == 1e6


def test_rope_scaling_that_contradicts_rope_parameters_is_refused():
    with pytest.raises(ModelError, match="must not contradict rope_parameters"):
        config(
            rope_parameters={"rope_type": "default"},
            rope_scaling={"rope_type": "linear", "factor": 2.0},
        )


def test_override_of_the_dtype_wins_over_both_of_its_names():
    values = override_config({**LLAMA, "dtype": "bfloat16"}, {"torch_dtype": "float32"})
    assert ModelConfig.from_hf(values).dtype == "float32"
