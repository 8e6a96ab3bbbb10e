"""The plan of large models: counted once for what repeats, with what fits, and what does not work."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launcher.__main__ import main
from launcher.host.disk import measure_read_gb_s, measure_write_gb_s
from launcher.schema import group_options
from launcher.tasks.plan.table import ranges
from parallel.checkpoint.layout import Layout, make_layout
from parallel.checkpoint.open import open_checkpoint
from parallel.checkpoint.plan import Workload, plan_rank, prefill_flops
from parallel.checkpoint.plan_disk import prepared_bytes, source_size
from parallel.checkpoint.plan_fit import largest_batch, longest_context, obstacles
from parallel.errors import ModelError
from parallel.model.config import ModelConfig
from quant.scheme import QuantScheme
from tests.checkpoints import write_checkpoint
from tests.models import RTN
from tests.test_prepared import prepare

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [name for name in group_options("model") if name != "checkpoint"]
GROUPED = replace(
    RTN, weight_dtype="int4", weight_quant_granularity="per_group", group_size=128,
    kvcache_dtype="int8",
)  # fmt: skip
FIRST_LAYER_APART = replace(
    GROUPED, layer_policies=({"pattern": "model.layers.0.*", "weight_dtype": None},)
)


def layout_of(name: str, scheme: QuantScheme = RTN) -> Layout:
    values = yaml.safe_load((ROOT / "conf/model" / f"{name}.yaml").read_text())
    return make_layout(ModelConfig.from_hf(values), scheme)


def plan(capsys, *words: str) -> dict:
    assert main(["plan", "plan.json=true", "plan.bandwidth_gb_s=1000", *words]) == 0
    return json.loads(capsys.readouterr().out)


def text(capsys, *words: str) -> str:
    assert main(["plan", "plan.bandwidth_gb_s=1000", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", SHAPES)
def test_layers_that_repeat_are_counted_once(name):
    """405B has 2,020 stored tensors in int8: what is asked of a rank must not walk through them."""
    layout = layout_of(name)
    assert len(layout.kinds) <= 25
    assert sum(count for _, count in layout.kinds) == len(layout.tensors)


@pytest.mark.parametrize("scheme", [QuantScheme(), RTN, GROUPED, FIRST_LAYER_APART])
@pytest.mark.parametrize("name", ["llama2_13b", "qwen2_14b"])
def test_bytes_of_a_rank_are_those_of_its_tensors(name, scheme):
    layout = layout_of(name, scheme)
    for tp in (1, 8, 40):
        for rank in {0, tp // 2, tp - 1}:
            for dtype in (None, "float32"):
                expected = sum(tensor.num_bytes(rank, tp, dtype) for tensor in layout.tensors)
                assert layout.rank_bytes(rank, tp, dtype) == expected


@pytest.mark.parametrize("name", SHAPES)
def test_every_size_to_64_works_or_has_a_reason(name):
    layout = layout_of(name)
    found = obstacles(layout, range(1, 65))
    refused = sorted(tp for sizes in found.values() for tp in sizes)
    for tp in range(1, 65):
        try:
            layout.check_tp(tp)
        except ModelError:
            assert tp in refused
        else:
            assert tp not in refused
    assert len(found) <= 3


def test_rank_that_would_get_nothing_is_a_reason():
    values = {"architectures": ["LlamaForCausalLM"], "vocab_size": 99, "hidden_size": 64,
              "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}  # fmt: skip
    grouped = replace(RTN, weight_dtype="int4", weight_quant_granularity="per_group", group_size=32)
    found = obstacles(make_layout(ModelConfig.from_hf(values), grouped), range(1, 9))
    assert {why.partition(" ")[0]: sizes for why, sizes in found.items()} == {
        "must": [3, 5, 6, 7],
        "would": [4, 8],
    }
    assert any("which has 2 parts" in why for why in found)


@pytest.mark.parametrize("scheme", [RTN, GROUPED], ids=["kv float", "kv int8"])
@pytest.mark.parametrize("tp", [1, 8, 16])
def test_longest_context_and_largest_batch_are_the_last_that_fit(tp, scheme):
    layout = layout_of("llama3_70b", scheme)
    workload = Workload(3, 4096, 512, "bfloat16")
    rank = plan_rank(layout, tp, workload)
    memory = rank.weight_bytes + 3_000_000_000

    def total(**more) -> int:
        return plan_rank(layout, tp, replace(workload, **more)).total_bytes

    length = longest_context(layout, rank, workload, memory)
    assert 0 < length < layout.config.max_position_embeddings
    assert total(max_length=length) <= memory < total(max_length=length + 1)
    batch = largest_batch(layout, rank, workload, memory)
    assert batch > 1
    assert total(batch_size=batch) <= memory < total(batch_size=batch + 1)


def test_nothing_fits_beside_weights_that_do_not_and_the_context_is_the_most():
    layout, workload = layout_of("llama2_7b"), Workload(1, 4096, 512, "float16")
    rank = plan_rank(layout, 1, workload)
    assert longest_context(layout, rank, workload, rank.weight_bytes) == 0
    assert largest_batch(layout, rank, workload, rank.weight_bytes) == 0
    assert longest_context(layout, rank, workload, 10**12) == 4096


def test_prefill_of_7b_is_two_operations_a_weight_and_a_little_attention():
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    attention = 32 * 4096 * 2 * 4097  # each channel, at 1 to 4096 positions: scores and values
    assert prefill_flops(layout_of("llama2_7b"), 1, 4096) == 2 * weights + attention
    assert prefill_flops(layout_of("llama2_7b"), 8, 4096) == (2 * weights + attention) // 8


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("scheme", [QuantScheme(), RTN, replace(GROUPED, group_size=32)])
def test_disk_that_prepare_needs_is_foreseen_from_above(tmp_path, size, scheme):
    source = write_checkpoint(
        tmp_path / "source", num_files=2, hidden_size=256, intermediate_size=512, head_dim=32
    )
    layout = open_checkpoint(source).layout(scheme)
    output = prepare(source, tmp_path / "out", size, scheme)
    written = sum(-(-file.stat().st_size // 4096) * 4096 for file in output.rglob("*.*"))
    foreseen = prepared_bytes(layout, size, source=source)
    # A name or a block too many is no matter for gigabytes; 200 KB of a 70B's 9 GB are none either.
    assert written <= foreseen <= written + 200_000
    alone = prepared_bytes(layout, size, ranks=[0], source=source)
    assert alone <= foreseen
    assert alone >= layout.rank_bytes(0, size)


def test_source_is_as_large_as_its_files_its_index_or_its_config_say(tmp_path):
    path = write_checkpoint(tmp_path / "source", num_files=2)
    layout = open_checkpoint(path).layout(RTN)
    files = sorted(path.glob("*.safetensors"))
    found = source_size(path, layout)
    assert (found.num_bytes, found.basis) == (
        sum(file.stat().st_size for file in files),
        "its files",
    )
    assert found.largest == max(files, key=lambda file: file.stat().st_size)
    (path / "consolidated.safetensors").write_bytes(bytes(9))  # the same weights in another form
    assert source_size(path, layout) == found
    (path / "consolidated.safetensors").unlink()
    files[0].unlink()  # a download that is not whole does not say how large it will be
    assert source_size(path, layout).basis == "its index"
    for file in files[1:]:
        file.unlink()
    plain = make_layout(layout.config, QuantScheme()).rank_bytes(0, 1)
    found = source_size(path, layout)
    assert (found.num_bytes, found.basis, found.largest) == (plain, "its index", None)
    found = source_size(None, layout)
    assert (found.num_bytes, found.basis) == (plain, "its config.json")


@pytest.mark.parametrize("total", ["138", -1, True, 1.5, None, [1]])
def test_index_whose_total_is_none_is_passed_over(tmp_path, total):
    path = write_checkpoint(tmp_path / "source", num_files=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["metadata"] = {"total_size": total}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    layout = open_checkpoint(path).layout(RTN)
    for file in path.glob("*.safetensors"):
        file.unlink()
    assert source_size(path, layout).basis == "its config.json"


def test_published_index_of_70b_says_the_size_of_its_source(shared, capsys):
    found = plan(capsys, f"checkpoint={shared / 'index/llama2-70b-chat-hf'}", "plan.disk_gb_s=2")
    assert found["source"] == {"bytes": 137953316864, "basis": "its index"}
    # 138 GB read at 2 GB/s, while as much is written.
    assert found["sizes"]["1"]["prepare_s"] == pytest.approx(69.0, abs=0.1)
    assert found["sizes"]["8"]["load_disk_s"] == pytest.approx(69.0, abs=0.1)


def test_json_has_everything_of_a_size(capsys):
    found = plan(
        capsys, "model=llama2_70b", "quant=rtn_a16w8", "parallel.tp=8", "plan.memory_gb=24",
        "plan.disk_gb_s=4", "plan.tflops=100",
    )  # fmt: skip
    size = found["sizes"]["8"]
    kinds = size["linear_bytes"] + size["embedding_bytes"] + size["other_bytes"]
    assert size["weight_bytes"] == kinds
    assert size["total_bytes"] == kinds + size["kv_cache_bytes"] + size["temporary_bytes"]
    assert (size["fits"], size["memory_bytes"]) == (True, 24_000_000_000)
    assert size["longest_context"] == 4096
    assert size["largest_batch"] > 50
    assert size["prepare_s"] == pytest.approx(138 / 4, rel=0.01)
    assert size["load_memory_s"] is None  # a bandwidth that was given is perhaps no host's
    assert size["prefill_tokens_per_s"] == pytest.approx(100e12 * 8 / (2 * 68.4e9), rel=0.05)
    assert found["obstacles"][0]["sizes"] == [3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15]
    assert found["sizes"]["1"]["fits"] is False


def test_table_is_short_at_64_ranks_and_says_why_others_do_not_work(capsys):
    printed = text(capsys, "model=llama3_405b", "quant=rtn_a16w8", "plan.max_tp=64")
    assert (
        "tp 3, 5-7, 9-15, 17-31, 33-63 do not work: must divide num_attention_heads (128)"
        in printed
    )
    assert "\n64  " in printed
    assert printed.count("\n") < 50
    assert max(map(len, printed.splitlines())) < 130


def test_both_reasons_of_a_model_are_grouped(capsys):
    printed = text(capsys, "model=qwen2_14b", "plan.max_tp=20")
    assert "tp 3, 6-7, 9, 11-19 do not work: must divide num_attention_heads (40)" in printed
    assert "tp 5, 10, 20 do not work: must divide num_key_value_heads (8)" in printed


def test_disk_that_is_too_small_is_foreseen(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("launcher.tasks.plan.machine.free_bytes", lambda _: 50_000_000_000)
    words = ("model=llama2_70b", "quant=rtn_a16w8", "plan.disk_gb_s=1", f"output={tmp_path / 'o'}")
    assert plan(capsys, *words, "parallel.tp=8")["output_fits"] is False
    printed = text(capsys, *words, "parallel.tp=8")
    assert "tp=8 needs 69.6 GB, and its disk, with 50.0 GB free, is too small" in printed
    assert "has room for it" in text(capsys, "model=llama2_7b", *words[2:])
    assert list(tmp_path.iterdir()) == []


def test_picture_is_drawn_beside_json(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "memory.png"
    words = ["model=llama2_70b", "quant=rtn_a16w8", "plan.memory_gb=24", f"plan.picture={path}"]
    assert main(["plan", "plan.json=true", "plan.bandwidth_gb_s=1", *words]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["tp"] == 1
    assert f"picture: {path}" in err
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["there.png", "no/such/folder.png", "memory.txt", "."])
def test_picture_that_cannot_be_is_refused_first(capsys, tmp_path, name):
    (tmp_path / "there.png").write_text("mine")
    assert main(["plan", "model=llama2_7b", f"plan.picture={tmp_path / name}"]) == 2
    assert "`plan.picture` must" in capsys.readouterr().err
    assert (tmp_path / "there.png").read_text() == "mine"


def test_plan_with_all_its_measurements_imports_no_torch(tmp_path):
    path = write_checkpoint(tmp_path / "source", num_files=2)
    script = (
        "import sys; from launcher.__main__ import main; "
        f"main(['plan', 'checkpoint={path}', 'output={tmp_path / 'out'}', "
        "'plan.json=true']); "
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "False"
    machine = json.loads(done.stdout)["machine"]
    assert machine["read_gb_s"] > 0
    # Between a slow board's one channel and the widest server's: a search that stops at once, or that
    # the cache answers, is beyond.
    assert 1 < machine["host_bandwidth_gb_s"] < 2000
    assert not (tmp_path / "out").exists()


def test_speeds_of_a_disk_are_measured_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_bytes(bytes(5_000_001))
    assert measure_read_gb_s(tmp_path / "file") > 0
    assert measure_read_gb_s(tmp_path / "missing") is None
    (tmp_path / "empty").touch()
    assert measure_read_gb_s(tmp_path / "empty") is None
    written = measure_write_gb_s(tmp_path)
    assert written is None or written > 0  # some file systems have no files without a name
    assert measure_write_gb_s(tmp_path / "missing") is None
    assert {file.name for file in tmp_path.iterdir()} == {"file", "empty"}


@pytest.mark.parametrize(
    ("sizes", "words"), [([], ""), ([3], "3"), ([3, 5, 6, 7, 9], "3, 5-7, 9"), ([1, 2], "1-2")]
)
def test_runs_of_sizes_are_written_short(sizes, words):
    assert ranges(sizes) == words
