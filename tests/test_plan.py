"""The plan: figures against those of real models, and against what ranks really hold."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from launcher.__main__ import main
from parallel.checkpoint.layout import make_layout
from parallel.checkpoint.plan import Workload, plan_rank
from parallel.checkpoint.source import TensorInfo
from parallel.generation.decode import GenerationLoop, Request
from parallel.generation.sampling import Sampling
from parallel.model.config import ModelConfig
from quant.scheme import QuantScheme
from tests.models import RTN, load, run_ranks

LLAMA2_13B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 5120,
    "intermediate_size": 13824, "num_hidden_layers": 4, "num_attention_heads": 40,
    "num_key_value_heads": 40, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
INDEXES = [
    "llama2-7b-chat-hf", "llama2-70b-chat-hf", "llama3.1-8b-merge", "mistral-7b-instruct-v0.3",
    "qwen2.5-14b-cogito",
]  # fmt: skip


def plan(capsys, *arguments: str) -> dict:
    status = main(["plan", "plan.json=true", "plan.bandwidth_gb_s=100", *arguments])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return json.loads(printed.out)


@pytest.mark.parametrize(("vocab_emb_dp", "gigabytes"), [("true", 9.1568), ("false", 8.6980)])
def test_llama2_70b_in_int8_on_8_ranks(capsys, vocab_emb_dp, gigabytes):
    found = plan(
        capsys, "model=llama2_70b", "quant=rtn_a16w8", "parallel.tp=8",
        f"parallel.vocab_emb_dp={vocab_emb_dp}",
    )  # fmt: skip
    assert found["sizes"]["8"]["weight_bytes"] / 1e9 == pytest.approx(gigabytes, abs=0.0001)
    # 40 KiB a token and rank in 16 bit.
    assert found["sizes"]["8"]["kv_cache_bytes"] == 40 * 1024 * 4096


def test_llama2_70b_is_137_9_gb_in_float16(capsys):
    found = plan(capsys, "model=llama2_70b", "parallel.tp=1")
    assert found["sizes"]["1"]["disk_bytes"] / 1e9 == pytest.approx(137.95, abs=0.01)


@pytest.mark.parametrize("name", INDEXES)
def test_real_configs_and_indexes_are_planned(shared, capsys, name):
    found = plan(capsys, f"checkpoint={shared / 'index' / name}", "plan.tp=[1,2,3,4,8,16]")
    sizes = found["sizes"]
    assert "valid sizes" in sizes["3"]["error"]
    for tp in found["valid_tp_sizes"]:
        if str(tp) in sizes:
            assert len(sizes[str(tp)]["rank_weight_bytes"]) == tp
    index = next((shared / "index" / name).glob("*.index.json"))
    total = json.loads(index.read_text()).get("metadata", {}).get("total_size")
    if total and name != "llama2-70b-chat-hf":  # its total counts rotary buffers and other dtypes
        assert sizes["1"]["disk_bytes"] == pytest.approx(total, rel=0.001)


def test_tables_name_every_kind_of_tensor_and_the_valid_sizes(capsys):
    assert (
        main(
            [
                "plan",
                "model=llama3_8b",
                "quant=rtn_a16w8",
                "parallel.tp=16",
                "plan.bandwidth_gb_s=1",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    for word in (
        "down_proj.weight",
        "int8 + bfloat16",
        "each on 2 ranks",
        "valid tp sizes: 1, 2, 4, 8, 16, 32",
    ):
        assert word in printed


class RandomSource:
    """A source without files: integers and floats of the right shapes."""

    path = Path("random")

    def __init__(self, layout):
        self.tensors = {
            tensor.name: TensorInfo(tensor.shape, tensor.dtype, "") for tensor in layout.tensors
        }

    def read(self, name, index):
        shape = [cut.stop - cut.start for cut in index]
        dtype = getattr(torch, self.tensors[name].dtype)
        if dtype == torch.int8:  # eight at a time, which is eight times as fast
            words = torch.randint(-(2**62), 2**62, (math.prod(shape) // 8 + 1,))
            return words.view(torch.int8)[: math.prod(shape)].view(shape)
        return torch.empty(shape, dtype=dtype).uniform_(-1e-3, 1e-3)

    def identity(self):
        return {}


class RandomCheckpoint:
    def __init__(self, config, scheme):
        self.config = config
        self._layout = make_layout(config, scheme)
        self.source = RandomSource(self._layout)

    def layout(self, scheme, *, vocab_emb_dp=False):
        return self._layout


@pytest.mark.parametrize(("size", "scheme"), [(2, RTN), (4, RTN), (4, QuantScheme())])
def test_ranks_of_13b_shape_hold_the_planned_bytes_and_reduce_twice_a_layer(size, scheme):
    config = ModelConfig.from_hf(LLAMA2_13B)
    checkpoint = RandomCheckpoint(config, scheme)
    planned = [checkpoint.layout(scheme).rank_bytes(rank, size) for rank in range(size)]

    def work(group):
        decoder = load(checkpoint, group, scheme, torch.bfloat16, length=8)
        held = sum(parameter.nbytes for parameter in parameters(decoder))
        loop = GenerationLoop(decoder, decoder.new_cache(1, 8), Sampling())
        list(loop.run([Request(0, (1, 2, 3), 2)]))
        return held, group.counts["all_reduce"], loop.timings

    for rank, (held, all_reduces, timings) in enumerate(run_ranks(size, work)):
        assert held == pytest.approx(planned[rank], rel=0.01)
        steps = timings.prefill_steps + timings.decode_steps
        assert steps == 2
        # Two a layer, and one for the embedding that is cut over the vocabulary.
        assert all_reduces == steps * (2 * config.num_hidden_layers + 1)


def parameters(decoder):
    """Every weight that a rank's decoder holds."""
    yield decoder.embed_tokens.local_weight
    yield decoder.lm_head.local_weight
    yield decoder.norm.weight_D
    for layer in decoder.layers:
        yield layer.input_layernorm.weight_D
        yield layer.post_attention_layernorm.weight_D
        yield layer.self_attn.qkv_proj.linear.local_weight
        yield layer.mlp.gate_up_proj.linear.local_weight
        yield layer.self_attn.o_proj.local_weight
        yield layer.mlp.down_proj.local_weight


def test_plan_counts_the_fullest_rank():
    config = ModelConfig.from_hf({**LLAMA2_13B, "vocab_size": 32001})
    layout = make_layout(config, QuantScheme())
    found = plan_rank(layout, 8, Workload(1, 128, 64, "bfloat16"))
    assert found.weight_bytes == max(layout.rank_bytes(rank, 8) for rank in range(8))
