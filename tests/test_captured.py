"""Decode steps as recorded calls of C: the bits of the steps that they stand for, or none at all."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from parallel.checkpoint.open import open_random
from parallel.errors import PeerError
from parallel.generation.decode import GenerationLoop, Request
from parallel.generation.sampling import Sampling
from parallel.group import LoneGroup, SimulatedGroup, ThreadGroup
from parallel.model import captured
from quant.elementwise import silu_product
from quant.kernels.native import NativeKernel
from quant.kernels.native.calls import is_available
from quant.kernels.native.recording import Recording
from quant.kernels.reference import ReferenceKernel
from quant.scheme import QuantScheme
from tests.models import RTN, load
from tests.test_shared_memory import ranks as running

pytestmark = pytest.mark.skipif(not is_available(), reason="no C compiler at installation")

W8A8 = QuantScheme(quant_method="rtn", weight_dtype="int8", activation_dtype="int8")
STATIC = replace(W8A8, act_quant_granularity="per_tensor")
W4A16 = QuantScheme(
    quant_method="rtn", weight_dtype="int4", weight_quant_granularity="per_group", group_size=32
)
W4A8 = QuantScheme(quant_method="rtn", weight_dtype="int4", activation_dtype="int8")
SCHEMES = {"w8a16": RTN, "w8a8": W8A8, "w4a16 g32": W4A16, "w4a8": W4A8, "w8a8 static": STATIC}
MODEL = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 131,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [20]]


def decoder(group, scheme, dtype, kernel=None):
    checkpoint = open_random(MODEL, scheme, seed=0)
    return load(checkpoint, group, scheme, dtype, kernel=kernel or NativeKernel())


def texts(model, new_tokens=12, on_token=None):
    """Sequences of unequal length end, and others join in their rows: three numbers of sequences."""
    cache = model.new_cache(3, 64)
    loop = GenerationLoop(model, cache, Sampling(), on_token=on_token)
    requests = [
        Request(index, tuple(ids), new_tokens - 3 * index) for index, ids in enumerate(PROMPTS)
    ]
    return sorted((item.index, item.token_ids) for item in loop.run([*requests, requests[0]]))


def programs(model):
    return [item for item in model._captured.values() if item.spoiled is None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_captured_steps_give_the_text_of_plain_ones(scheme, dtype, monkeypatch):
    model = decoder(LoneGroup(), scheme, dtype)
    found = texts(model)
    assert len(programs(model)) == 3
    assert texts(model) == found  # with another cache
    monkeypatch.setattr(captured, "is_available", lambda: False)
    plain = decoder(LoneGroup(), scheme, dtype)
    assert texts(plain) == found
    assert not plain._captured


def step_of_ranks(group, scheme):
    """Each rank is late in turn, by more than a call in C waits."""
    model = decoder(group, scheme, torch.bfloat16)

    def be_late(_index, token):
        time.sleep(0.02 if token % 3 == 0 else 0)
        return False

    found = texts(model, on_token=be_late)
    return found, len(programs(model)), dict(group.counts)


def plain_step_of_ranks(group, scheme):
    captured.is_available = lambda: False
    found, num_programs, counts = step_of_ranks(group, scheme)
    assert num_programs == 0
    return found, num_programs, counts


@pytest.mark.parametrize("scheme", [W8A8, STATIC], ids=["w8a8", "w8a8 static"])
@pytest.mark.parametrize("size", [2])
def test_ranks_capture_their_collectives(size, scheme):
    alone = texts(decoder(LoneGroup(), scheme, torch.bfloat16))
    with running(size, partial(step_of_ranks, scheme=scheme)) as ranks:
        results = ranks.results()
    with running(size, partial(plain_step_of_ranks, scheme=scheme)) as ranks:
        plain = ranks.results()
    for (found, num_programs, counts), (_, _, plain_counts) in zip(results, plain, strict=True):
        assert found == alone
        assert num_programs == 3
        assert counts == plain_counts


@pytest.mark.parametrize("scheme", [W4A16, W4A8], ids=["w4a16 g32", "w4a8"])
def test_rank_captures_the_sums_of_int4(scheme, monkeypatch):
    """Of its part of o_proj and down_proj, which are scaled after they are added up."""

    def steps():
        model = decoder(SimulatedGroup(1, 2), scheme, torch.bfloat16)
        return texts(model), len(programs(model))

    found, num_programs = steps()
    assert num_programs == 3
    monkeypatch.setattr(captured, "is_available", lambda: False)
    assert steps() == (found, 0)


def step_of_a_rank_that_ends(group):
    model = decoder(group, W8A8, torch.bfloat16)
    steps = 0

    def end(_index, _token):
        nonlocal steps
        steps += 1
        if steps == 9:
            os._exit(3)
        return False

    return texts(model, on_token=end if group.rank == 0 else None)


def test_rank_that_ends_is_named_by_a_captured_step():
    with running(2, step_of_a_rank_that_ends) as ranks:
        error = ranks.result(1)
    assert isinstance(error, PeerError)
    assert "rank 0 is gone" in str(error)


def test_product_of_torch_spoils_a_recording():
    model = decoder(LoneGroup(), RTN, torch.bfloat16, ReferenceKernel())
    found = texts(model)
    assert not programs(model)
    assert not model._can_capture
    assert texts(model) == found


def test_collective_of_torch_spoils_a_recording():
    def work(group):
        model = decoder(group, RTN, torch.float32)
        return texts(model), len(programs(model))

    alone = texts(decoder(LoneGroup(), RTN, torch.float32))
    assert ThreadGroup.run(2, work) == [(alone, 0)] * 2


def test_simulated_rank_is_captured_and_counts_its_collectives():
    group = SimulatedGroup(1, 2)
    model = decoder(group, W8A8, torch.bfloat16)
    texts(model)
    counts = dict(group.counts)
    assert programs(model)
    plain_group = SimulatedGroup(1, 2)
    plain = decoder(plain_group, W8A8, torch.bfloat16)
    plain._can_capture = False
    texts(plain)
    assert counts == plain_group.counts


@pytest.mark.parametrize(
    "operation",
    [lambda x: x + 1, lambda x: x.add_(1), lambda x: x.copy_(x), lambda x: x.bfloat16()],
    ids=["out of place", "in place", "copy", "cast"],
)
def test_what_torch_computes_is_noticed(operation):
    with torch.inference_mode(), Recording() as recording:
        operation(torch.empty(4))
    assert recording.spoiled


def test_views_and_allocations_are_no_computations():
    x = torch.randn(2, 32)
    with torch.inference_mode(), Recording() as recording:
        recording.next_layer()
        y = silu_product(x.view(2, 2, 16).flatten(1).float(), (16, 16))
        y.unflatten(1, (2, 8)).transpose(0, 1).split(1)
    assert recording.spoiled is None
    assert recording.num_calls == 1


def test_buffers_of_a_layer_serve_the_layer_after_the_next():
    with torch.inference_mode(), Recording() as recording:
        addresses = []
        for _ in range(4):
            recording.next_layer()
            addresses.append([torch.empty(4).data_ptr(), torch.empty(4).data_ptr()])
    assert addresses[0] == addresses[2]
    assert addresses[1] == addresses[3]
    assert len({address for layer in addresses for address in layer}) == 4
