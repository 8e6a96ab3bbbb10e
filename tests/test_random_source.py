"""Random weights: the same values in any slice and at every tensor-parallel size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.checkpoint.open import open_random
from parallel.generation.score import score
from quant.scheme import QuantScheme
from tests.models import RTN, load, run_ranks

# Sizes that do not divide, two kv heads, and an FFN longer than a row stride of the source.
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 515, "hidden_size": 64,
    "intermediate_size": 4172, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN = {**SHAPE, "architectures": ["Qwen2ForCausalLM"]}
STATIC = replace(RTN, activation_dtype="int8", act_quant_granularity="per_tensor")
GROUPED = replace(RTN, weight_dtype="int4", weight_quant_granularity="per_group", group_size=32)
SCHEMES = pytest.mark.parametrize(
    "scheme",
    [QuantScheme(), RTN, STATIC, GROUPED],
    ids=["none", "w8a16", "w8a8 static", "w4a16 g32"],
)


def whole(source, name):
    return source.read(name, tuple(slice(0, length) for length in source.tensors[name].shape))


@SCHEMES
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_slices_of_the_ranks_are_those_of_the_whole_tensor(scheme, size):
    checkpoint = open_random(QWEN, scheme, seed=5)
    for tensor in checkpoint.layout(scheme).tensors:
        full = whole(checkpoint.source, tensor.name)
        assert full.dtype == getattr(torch, tensor.dtype)
        for rank in range(size):
            index = tensor.index(rank, size)
            part = checkpoint.source.read(tensor.name, index)
            assert part.is_contiguous()
            assert torch.equal(part, full[index]), tensor.name


def test_any_slice_of_a_tensor_longer_than_the_block_is_equal():
    shape = {**SHAPE, "intermediate_size": 20011}
    source = open_random(shape, RTN, seed=1).source
    name = "model.layers.1.mlp.up_proj.weight"
    full = whole(source, name)
    for cut in ((slice(3, 4), slice(0, 64)), (slice(255, 9001), slice(7, 61))):
        assert torch.equal(source.read(name, cut), full[cut])


def test_values_follow_the_seed_and_the_name():
    def read(seed, name):
        return whole(open_random(SHAPE, RTN, seed=seed).source, name)

    up, gate = (f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("up", "gate"))
    assert torch.equal(read(1, up), read(1, up))
    assert not torch.equal(read(1, up), read(2, up))
    assert not torch.equal(read(1, up), read(1, gate))
    assert read(1, up).min() == -127
    assert torch.equal(read(1, "model.norm.weight"), torch.ones(64, dtype=torch.bfloat16))


@SCHEMES
def test_logits_are_finite_and_the_same_at_every_size(scheme):
    checkpoint = open_random(SHAPE, scheme, seed=0)

    def work(group):
        decoder = load(checkpoint, group, scheme, length=16)
        return score(decoder, decoder.new_cache(1, 16), list(range(16)), 1, 16)

    alone, *others = (run_ranks(size, work)[0] for size in (1, 2, 4, 8))
    assert torch.isfinite(alone).all()
    assert 0.1 < alone.std() < 10
    for found in others:
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_a_tied_head_that_is_quantized_has_values_of_its_own():
    scheme = QuantScheme(quant_method="rtn", weight_dtype="int8", modules_to_not_convert=())
    checkpoint = open_random({**SHAPE, "tie_word_embeddings": True}, scheme, seed=0)
    decoder = run_ranks(1, lambda group: load(checkpoint, group, scheme, length=4))[0]
    assert decoder.lm_head.local_weight.shape == (515, 64)
