"""What sliding windows leave of a step's bytes and operations: counted as C reads them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from launcher.__main__ import main
from launcher.tasks.bench.case import decode_step, prefill_steps
from launcher.tasks.bench.work import Case, decode_work, prefill_work
from parallel.checkpoint.memory import Memory
from parallel.checkpoint.open import open_checkpoint, open_random
from parallel.checkpoint.plan import Workload, kv_position_bytes, plan_rank, prefill_flops
from parallel.group import LoneGroup
from parallel.model.windows import positions_seen
from quant.attention import decode_attention
from quant.kernels.native import calls
from quant.scheme import QuantScheme
from tests.checkpoints import write_checkpoint
from tests.models import CPU, load

WINDOWS = [(None,), (1,), (7,), (100,), (None, 5, 5, None, 12)]
BY_LAYER = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
WINDOWED = {
    "every layer": {"architectures": ["MistralForCausalLM"], "sliding_window": 16},
    "from a layer on": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
    "layer types": {
        "use_sliding_window": True, "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
}  # fmt: skip
# How many of the four layers have one.
WITH_WINDOWS = {"every layer": 4, "from a layer on": 1, "layer types": 2}
needs_c = pytest.mark.skipif(not calls.is_available(), reason="no C compiler at installation")


def layout_of(**more):
    shape = {**BY_LAYER, **more}
    return open_random(shape, QuantScheme(), seed=0).layout(QuantScheme())


def layout_without(name):
    """Of the same family."""
    return layout_of(
        **{key: WINDOWED[name][key] for key in WINDOWED[name].keys() & BY_LAYER.keys()}
    )


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_positions_seen_are_those_that_each_query_sees_one_by_one(windows):
    for start, stop in ((0, 1), (0, 30), (3, 4), (6, 8), (11, 200), (5, 5)):
        one_by_one = sum(
            min(position + 1, window or math.inf)
            for window in windows
            for position in range(start, stop)
        )
        assert positions_seen(windows, start, stop) == one_by_one


@needs_c
@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_c_reads_as_many_positions_as_are_counted(window):
    """A key that is NaN makes NaN of the result where it is read, and of none where it is not."""
    length = 24
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 16, generator=random)
    keys, values = torch.randn(2, 1, 2, length, 16, generator=random)

    def reads(query: int, poisoned: int) -> bool:
        bad = keys.clone()
        bad[:, :, poisoned] = torch.nan
        out = decode_attention(q, bad, values, torch.tensor([query]), lambda: None, window)
        return bool(out.isnan().any())

    found = sum(reads(query, place) for query in range(10, length) for place in range(length))
    assert found == positions_seen((window,), 10, length)


@needs_c
@pytest.mark.parametrize("size", [8, 16])
def test_step_reads_nothing_before_the_window_of_its_first_query(tmp_path, size):
    """Chunks of a prefill, and decode steps recorded once and run on: what lies before is NaN."""
    path = write_checkpoint(
        tmp_path, architectures=["MistralForCausalLM"], sliding_window=size, num_hidden_layers=2
    )
    ids_BP = torch.randint(3, 2000, (1, 50), generator=torch.Generator().manual_seed(0))

    def run(*, poisoned: bool) -> list[torch.Tensor]:
        decoder = load(open_checkpoint(path), LoneGroup())
        cache = decoder.new_cache(1, 64)
        found: list[torch.Tensor] = []

        def step(item, first: int) -> None:
            unseen = torch.arange(max(0, first + 1 - size))
            if poisoned and len(unseen):
                bad = torch.full((len(unseen), 2, 16), torch.nan)
                for layer in range(2):
                    cache.write(layer, unseen, bad, bad)
            logits = decoder(item, cache)
            if logits is not None:
                found.append(logits.clone())

        for item in prefill_steps(ids_BP, 64, 7):
            step(item, int(item.positions_T[0]))
        for position in range(50, 60):
            step(decode_step([5], position, 64, CPU), position)
        return found

    for clean, bad in zip(run(poisoned=False), run(poisoned=True), strict=True):
        assert torch.equal(clean, bad)


@pytest.mark.parametrize("name", WINDOWED)
def test_work_of_a_bench_is_that_of_the_windows(name):
    """Each layer by itself; the rest is the work of the same model without windows."""
    case = Case(batch_size=3, prompt_length=100, new_tokens=10, chunk=64)
    windowed = Memory(layout_of(**WINDOWED[name]), "bfloat16")
    full = Memory(layout_without(name), "bfloat16")
    layers = WITH_WINDOWS[name]
    # Of each sequence, in the layers with a window: what full attention sees beyond its 16 positions.
    decoded = layers * sum(length - 16 for length in range(101, 111))
    prefilled = layers * sum(length - 16 for length in range(17, 101))
    entry = 2 * 2 * 8 * 2  # keys and values of 2 heads of 8, in 2 bytes
    assert kv_position_bytes(full.layout, 1, "bfloat16") == entry
    for phase, beyond in ((decode_work, decoded), (prefill_work, prefilled)):
        found, whole = phase(windowed, case, [0], 1), phase(full, case, [0], 1)
        assert whole.operations - found.operations == 3 * beyond * 4 * 4 * 8
        read = entry * 3 * beyond if phase is decode_work else 0
        assert whole.num_bytes - found.num_bytes == read


@pytest.mark.parametrize("name", WINDOWED)
def test_plan_counts_windows_in_speeds_and_the_whole_length_in_memory(name):
    windowed, full = layout_of(**WINDOWED[name]), layout_without(name)
    layers = WITH_WINDOWS[name]
    workload = Workload(2, 1000, 64, "bfloat16")
    found, whole = (plan_rank(layout, 1, workload) for layout in (windowed, full))
    beyond = layers * sum(length - 16 for length in range(17, 1001))
    assert found.total_bytes == whole.total_bytes
    assert whole.read_bytes - found.read_bytes == pytest.approx(2 * 64 * beyond / 1000, abs=1)
    less = prefill_flops(full, 1, 1000) - prefill_flops(windowed, 1, 1000)
    assert less == pytest.approx(4 * 32 * beyond / 1000, abs=1)


def test_plan_of_mistral_7b_at_32k_is_that_of_its_window(capsys):
    """Each of 8 sequences reads 3,840 positions of 131,072 bytes on average; without a window 16,384."""
    words = (
        "model=mistral_7b_v01", "parallel.tp=1", "plan.tp=[1]", "plan.bandwidth_gb_s=1000",
        "plan.memory_gb=80", "plan.tflops=100", "plan.max_length=32768", "plan.batch_size=8",
    )  # fmt: skip
    assert main(["plan", "plan.json=true", *words]) == 0
    size = json.loads(capsys.readouterr().out)["sizes"]["1"]
    weights = 7_241_732_096 * 2 - 32000 * 4096 * 2  # the embedding is not read
    seen = sum(min(length, 4096) for length in range(1, 32769)) / 32768
    assert size["read_bytes"] == pytest.approx(weights + 8 * seen * 131072, rel=1e-6)
    assert size["decode_tokens_per_s"] == pytest.approx(438.4, abs=0.1)
    assert size["prefill_tokens_per_s"] == pytest.approx(6261, abs=1)
    assert size["kv_cache_bytes"] == 8 * 32768 * 131072


def test_bench_of_a_long_prompt_and_a_short_window_reads_the_window():
    shape = {
        "architectures": ["MistralForCausalLM"], "vocab_size": 256, "hidden_size": 256,
        "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 128, "max_position_embeddings": 8192,
        "sliding_window": 16, "torch_dtype": "float32",
    }  # fmt: skip
    memory = Memory(layout_of(**shape), "float32")
    case = Case(batch_size=1, prompt_length=8000, new_tokens=5, chunk=512)
    step = decode_work(memory, case, [0], 1).num_bytes / 5
    assert step == 36_971_520 + 16 * 65_536
