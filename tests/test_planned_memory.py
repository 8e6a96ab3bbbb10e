"""What is planned for a rank's memory is what it holds, byte for byte, for every kernel and scheme."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from launcher.__main__ import main
from launcher.host.processor import takes_quads
from parallel.checkpoint.memory import Memory
from parallel.checkpoint.open import open_checkpoint
from parallel.checkpoint.plan import Workload, plan_rank
from parallel.load import load_decoder
from quant.activations import LEVELS_INT8
from quant.kernels import Kernel
from quant.kernels.native import NativeKernel, calls
from quant.kernels.onednn import OneDnnKernel
from quant.kernels.reference import ReferenceKernel
from quant.packing import Packing
from quant.scheme import QuantScheme
from tests.checkpoints import write_checkpoint
from tests.models import CPU, RTN, run_ranks
from tests.test_command import run, run_dir

# Channels in no whole blocks of 32, columns in no whole eights, heads that begin inside a group.
ODD = {"intermediate_size": 401, "head_dim": 24, "hidden_size": 72, "vocab_size": 2051}
MODELS = {
    "odd": ODD,
    "tied": {**ODD, "tie_word_embeddings": True},
    "biased": {**ODD, "attention_bias": True, "mlp_bias": True},
    "qwen3": {**ODD, "architectures": ["Qwen3ForCausalLM"]},
}
HEAD_TOO = {"modules_to_not_convert": ()}
SCHEMES = {
    "none": QuantScheme(),
    "w8a16": RTN,
    "w8a16 head": replace(RTN, **HEAD_TOO),
    "w8a8": replace(RTN, activation_dtype="int8"),
    "w4a16": replace(RTN, weight_dtype="int4", **HEAD_TOO),
    **{
        f"w{bits}a16 g{size}": replace(
            RTN,
            weight_dtype=f"int{bits}",
            weight_quant_granularity="per_group",
            group_size=size,
        )
        for bits, size in ((4, 32), (4, 128), (8, 64))
    },
    "mixed": replace(
        RTN,
        layer_policies=(
            {"pattern": "model.layers.0.*", "activation_dtype": "int8"},
            {"pattern": "model.layers.1.mlp.*", "weight_dtype": "int4"},
        ),
    ),
}
needs_c = pytest.mark.skipif(not calls.is_available(), reason="no C compiler at installation")


def held_and_planned(path, scheme, size, dtype, kernel: Kernel, packing: Packing, **how):
    """Of each rank: bytes that are loaded, and bytes that are foreseen."""
    checkpoint = open_checkpoint(path)
    layout = checkpoint.layout(scheme, **how)
    memory = Memory(layout, str(dtype).removeprefix("torch."), packing)

    def work(group):
        loaded = load_decoder(
            layout, checkpoint.source, group, dtype, CPU, max_length=8, kernel=kernel, num_threads=1
        )
        return loaded[1].weight_bytes

    return run_ranks(size, work), [memory.weight_bytes(rank, size) for rank in range(size)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    dtypes = {"odd": torch.float16, "tied": torch.bfloat16}
    return {
        name: write_checkpoint(folder / name, dtype=dtypes.get(name, torch.float32), **config)
        for name, config in MODELS.items()
    }


@needs_c
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_rank_holds_in_c_what_was_planned(models, name, scheme, size):
    for dtype in (torch.float32, torch.bfloat16):
        packing = Packing("native", takes_quads())
        held, planned = held_and_planned(models[name], scheme, size, dtype, NativeKernel(), packing)
        assert held == planned


@needs_c
@pytest.mark.parametrize("size", [1, 2])
def test_portable_set_of_c_holds_what_was_planned(models, size):
    """It takes quads for int8 activations: columns in fours, and the sums behind them."""
    for scheme in (SCHEMES["w8a8"], SCHEMES["mixed"], SCHEMES["w8a16"]):
        kernel, packing = NativeKernel("portable"), Packing("native", True)
        held, planned = held_and_planned(
            models["odd"], scheme, size, torch.float32, kernel, packing
        )
        assert held == planned


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_other_kernels_hold_what_was_planned(models, scheme, size):
    for kernel in (ReferenceKernel(), OneDnnKernel()):
        packing = Packing(kernel.name)
        held, planned = held_and_planned(
            models["odd"], scheme, size, torch.bfloat16, kernel, packing
        )
        assert held == planned


def test_embedding_that_every_rank_has_whole_is_counted_whole(models):
    for name in ("odd", "tied"):
        how = models[name], RTN, 2, torch.bfloat16, ReferenceKernel(), Packing("reference")
        held, planned = held_and_planned(*how, vocab_emb_dp=True)
        assert held == planned


@pytest.mark.parametrize("name", ["odd", "tied"])
@pytest.mark.parametrize("size", [1, 2])
def test_step_reads_all_but_the_embedding_and_lm_head_where_it_is_tied(models, name, size):
    memory = Memory(open_checkpoint(models[name]).layout(RTN), "bfloat16")
    ranks = range(size)
    held = [memory.bytes_by_kind(rank, size) for rank in ranks]
    linear, embedding, other = map(sum, zip(*held, strict=True))
    head = 2 * 2051 * 72
    assert embedding == (head if name == "tied" else 2 * head)
    assert sum(memory.read_bytes(rank, size) for rank in ranks) == linear + other + head


@needs_c
def test_processor_takes_quads_where_the_library_does():
    width = calls.open_library().shardrun_width(calls.widest(), LEVELS_INT8)
    assert takes_quads() == (width == 4)


@needs_c
@pytest.mark.parametrize(
    ("words", "tp"),
    [
        (("dtype=bfloat16",), 1),
        (("quant=rtn_a16w8", "kernel=reference"), 2),
        (("quant=rtn_a16w8", "quant.activation_dtype=int8", "kernel=native"), 2),
    ],
    ids=str,
)
def test_report_of_a_run_has_the_bytes_of_the_plan(models, tmp_path, capsys, words, tp):
    words = (f"checkpoint={models['biased']}", f"parallel.tp={tp}", *words)
    assert main(["plan", "plan.json=true", "plan.bandwidth_gb_s=1", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    done = run(tmp_path, "generate", *words, "prompt=Once", "generation.max_new_tokens=2")
    assert done.returncode == 0, done.stderr
    report = json.loads((run_dir(tmp_path) / "report.json").read_text())
    assert found["sizes"][str(tp)]["rank_weight_bytes"] == report["weight_bytes"]


@pytest.mark.parametrize(
    ("words", "kernel"),
    [
        ((), "native"),
        (("kernel=onednn",), "onednn"),
        (("kernel=reference",), "reference"),
        (("device=cuda",), "reference"),
    ],
    ids=str,
)
def test_plan_counts_for_the_kernel_of_the_words(capsys, words, kernel):
    words = ("model=llama2_7b", "quant=rtn_a16w4", "plan.bandwidth_gb_s=1", *words)
    assert main(["plan", "plan.json=true", *words]) == 0
    assert json.loads(capsys.readouterr().out)["workload"]["packing"]["kernel"] == kernel


def test_fullest_rank_is_that_of_the_packed_bytes(models):
    layout = open_checkpoint(models["odd"]).layout(RTN)
    workload = Workload(1, 64, 32, "bfloat16")
    memory = Memory(layout, "bfloat16")
    most = max(memory.weight_bytes(rank, 2) for rank in range(2))
    assert plan_rank(layout, 2, workload).weight_bytes == most
