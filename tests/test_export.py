"""export: a prepared checkpoint of any size as one Hugging Face checkpoint, and back, bit for bit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from launcher.__main__ import main
from launcher.resolve import DEMO
from parallel.checkpoint.export import check_exportable, write_export
from parallel.checkpoint.open import describe_layout, open_checkpoint
from parallel.errors import CheckpointError
from quant.scheme import QuantScheme
from tests.checkpoints import write_checkpoint
from tests.memory import peak_kib
from tests.models import RTN, generate
from tests.test_prepared import checksums, merged, prepare

LIMIT = 5_000_000_000
# Columns that groups of 128 divide, and two kv heads, so that tp=4 replicates them.
SHAPE = {"hidden_size": 128, "intermediate_size": 512}
GROUPED = {"weight_quant_granularity": "per_group"}
SCHEMES = {
    "w8a16": {"weight_dtype": "int8"},
    "w8a16 g64": {"weight_dtype": "int8", "group_size": 64, **GROUPED},
    "w4a16": {"weight_dtype": "int4"},
    "w4a16 g32": {"weight_dtype": "int4", "group_size": 32, **GROUPED},
    "w4a16 g128": {"weight_dtype": "int4", "group_size": 128, **GROUPED},
    "w8a8": {"weight_dtype": "int8", "activation_dtype": "int8"},
    "w4a8 g32": {
        "weight_dtype": "int4", "group_size": 32, "activation_dtype": "int8", **GROUPED,
    },
    "mixed": {
        "weight_dtype": "int4", "group_size": 128, **GROUPED,
        "modules_to_not_convert": ("lm_head", "model.layers.0.self_attn.o_proj"),
        "layer_policies": (
            {"pattern": "down_proj", "weight_dtype": "int8", "activation_dtype": "int8",
             "weight_quant_granularity": "per_channel"},
            {"pattern": "model.layers.1.self_attn.?_proj", "weight_dtype": "int8",
             "weight_quant_granularity": "per_channel"},
        ),
    },
}  # fmt: skip
PACKED = [name for name in SCHEMES if "a8" not in name and name != "mixed"]


def make_scheme(name: str) -> QuantScheme:
    return QuantScheme(quant_method="rtn", **SCHEMES[name])


def export(prepared: Path, output: Path, max_shard_bytes: int = LIMIT) -> Path:
    checkpoint = open_checkpoint(prepared)
    layout = checkpoint.layout(QuantScheme())
    write_export(layout, checkpoint.source, output, max_shard_bytes=max_shard_bytes, num_threads=2)
    return output


def read_all(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def is_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name])
        for name in expected
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return write_checkpoint(folder / "source", dtype=torch.bfloat16, **SHAPE)


@pytest.fixture(scope="module", params=SCHEMES)
def exported(request, source, tmp_path_factory):
    """The name of a scheme, the checkpoint prepared so for two ranks, and that exported."""
    folder = tmp_path_factory.mktemp("exported")
    prepared = prepare(source, folder / "tp2", 2, make_scheme(request.param))
    return request.param, prepared, export(prepared, folder / "hf")


def test_preparing_an_export_gives_the_integers_and_scales_of_preparing_the_source(
    source, exported, tmp_path
):
    name, _, path = exported
    again = prepare(path, tmp_path / "again", 4, QuantScheme())
    direct = prepare(source, tmp_path / "direct", 4, make_scheme(name))
    assert is_equal(merged(again), merged(direct))
    found = open_checkpoint(again).layout(QuantScheme())
    expected = open_checkpoint(direct).layout(QuantScheme())
    assert found.schemes == expected.schemes
    assert found.labels == expected.labels
    assert "quantization_config" not in json.loads((again / "config.json").read_text())


def test_an_export_generates_the_text_of_what_it_was_made_of(exported):
    _, prepared, path = exported
    expected = generate(prepared, [[1, 7], [1]], 2, new_tokens=15)
    assert generate(path, [[1, 7], [1]], 1, new_tokens=15) == expected
    assert generate(path, [[1, 7], [1]], 4, new_tokens=15) == expected


def test_an_export_does_not_depend_on_the_size_it_was_prepared_for(source, exported, tmp_path):
    name, _, path = exported
    prepared = prepare(source, tmp_path / "tp4", 4, make_scheme(name))
    assert checksums(export(prepared, tmp_path / "hf")) == checksums(path)


def test_plan_counts_an_export_as_its_files_are(exported):
    _, _, path = exported
    planned = describe_layout(path, QuantScheme(), {}, vocab_emb_dp=False)
    opened = open_checkpoint(path).layout(QuantScheme())
    assert planned.rank_bytes(1, 2) == opened.rank_bytes(1, 2)
    assert planned.schemes == opened.schemes


def test_scales_keep_the_dtype_of_the_checkpoint(exported):
    _, _, path = exported
    scales = {name: t.dtype for name, t in read_all(path).items() if name.endswith("_scale")}
    assert len(scales) >= 12
    assert set(scales.values()) == {torch.bfloat16}


@pytest.mark.parametrize("name", ["w4a16", "w8a16"])
def test_rows_that_end_inside_a_word_come_back(name, tmp_path):
    """An FFN of 401 and heads of 26 channels: odd rows, and words that are not full."""
    source = write_checkpoint(tmp_path / "source", intermediate_size=401, head_dim=26)
    scheme = make_scheme(name)
    prepared = prepare(source, tmp_path / "tp2", 2, scheme)
    path = export(prepared, tmp_path / "hf")
    again = prepare(path, tmp_path / "again", 4, QuantScheme())
    direct = prepare(source, tmp_path / "direct", 4, scheme)
    assert is_equal(merged(again), merged(direct))
    assert generate(path, [[1]], 4) == generate(prepared, [[1]], 2)


# ------------------------------------------------------------------------------------- unquantized


@pytest.mark.parametrize("path", [DEMO, None], ids=["tied", "untied"])
def test_an_unquantized_export_is_the_source_again(path, source, tmp_path):
    path = path or source
    prepared = prepare(path, tmp_path / "tp2", 2, QuantScheme())
    out = export(prepared, tmp_path / "hf")
    assert is_equal(read_all(out), read_all(path))
    assert (out / "config.json").read_bytes() == (path / "config.json").read_bytes()
    assert generate(out, [[1]], 2) == generate(path, [[1]], 1)


def test_files_beside_the_weights_are_kept(tmp_path):
    out = export(prepare(DEMO, tmp_path / "tp2", 2, RTN), tmp_path / "hf")
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (DEMO / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((DEMO / "config.json").read_text())


def test_a_tied_lm_head_that_is_quantized_is_untied(tmp_path):
    scheme = QuantScheme(quant_method="rtn", weight_dtype="int8", modules_to_not_convert=())
    prepared = prepare(DEMO, tmp_path / "tp2", 2, scheme)
    out = export(prepared, tmp_path / "hf")
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["ignore"] == []
    assert config["quantization_config"]["config_groups"]["group_0"]["targets"] == [
        "lm_head",
        "Linear",
    ]
    tensors = read_all(out)
    assert tensors["lm_head.weight_packed"].dtype == torch.int32
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    again = prepare(out, tmp_path / "again", 2, QuantScheme())
    assert is_equal(merged(again), merged(prepared))


# ------------------------------------------------------------------------------------------- files


def test_weights_above_the_limit_are_divided_with_an_index(source, tmp_path):
    prepared = prepare(source, tmp_path / "tp2", 2, make_scheme("w4a16 g32"))
    whole = export(prepared, tmp_path / "whole")
    divided = export(prepared, tmp_path / "divided", 100_000)
    index = json.loads((divided / "model.safetensors.index.json").read_text())
    names = sorted(file.name for file in divided.glob("*.safetensors"))
    assert len(names) > 5
    assert names == [
        f"model-{n:05}-of-{len(names):05}.safetensors" for n in range(1, len(names) + 1)
    ]
    assert set(index["weight_map"].values()) == set(names)
    for name in names:
        tensors = load_file(divided / name)
        assert {index["weight_map"][tensor] for tensor in tensors} == {name}
        rows = {tensor.rpartition(".")[0] for tensor in tensors}
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 100_000 or len(rows) == 1
        with safe_open(divided / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}  # transformers refuses a file without
    assert is_equal(read_all(divided), read_all(whole))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_all(whole).values())
    assert not (whole / "model.safetensors.index.json").exists()
    assert generate(divided, [[1]], 2) == generate(whole, [[1]], 2)


def test_a_failed_export_leaves_nothing_behind(source, tmp_path, monkeypatch):
    prepared = prepare(source, tmp_path / "tp2", 2)
    monkeypatch.setattr(
        os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space"))
    )
    with pytest.raises(CheckpointError, match="No space"):
        export(prepared, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["tp2"]


def test_anonymous_memory_of_export_does_not_grow_with_the_model(tmp_path):
    """Two models of one layer shape, 2 and 12 layers: the peak is that of a few tensors."""
    script = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from tests.checkpoints import write_checkpoint
from tests.memory import watch_memory
from tests.test_export import export
from tests.test_prepared import prepare
root, layers = Path(sys.argv[1]), int(sys.argv[2])
write_checkpoint(root / "source", num_hidden_layers=layers, hidden_size=1024, intermediate_size=2816,
                 num_attention_heads=8, num_key_value_heads=8, dtype=torch.bfloat16)
prepare(root / "source", root / "tp2", 2)
_, peak, _ = watch_memory(lambda: export(root / "tp2", root / "out"))
print(peak >> 10)
"""

    small, large = (peak_kib(script, tmp_path, layers) for layers in (2, 12))
    # 10 more layers are 113 MB of int8. A tensor is 2.9 MB, joined from its shards and turned over,
    # two at a time; the small model may be done between two looks, so the bound is theirs alone.
    assert large < small + 60_000


# ---------------------------------------------------------------------------------------- refusals


def run_command(capsys, *words: str) -> str:
    assert main(["export", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_command_writes_what_the_library_writes(source, tmp_path, capsys):
    prepared = prepare(source, tmp_path / "tp2", 2)
    words = (f"checkpoint={prepared}", f"output={tmp_path / 'hf'}", "export.max_shard_bytes=100000")
    assert main(["export", *words]) == 0
    assert "w8a16" in capsys.readouterr().out
    assert checksums(tmp_path / "hf") == checksums(export(prepared, tmp_path / "again", 100_000))
    assert "exists already" in run_command(capsys, *words)


def test_what_export_would_pass_over_is_refused(source, tmp_path, capsys):
    prepared = prepare(source, tmp_path / "tp2", 2)
    output = f"output={tmp_path / 'hf'}"
    whole = (f"checkpoint={prepared}", output)
    assert "`output`" in run_command(capsys, f"checkpoint={prepared}")
    assert "`checkpoint`" in run_command(capsys, output)
    assert "prepare it first" in run_command(capsys, f"checkpoint={source}", output)
    assert "`quant`" in run_command(capsys, *whole, "quant=rtn_a16w8")
    assert "`parallel.tp`" in run_command(capsys, *whole, "parallel.tp=4")
    assert "`dtype`" in run_command(capsys, *whole, "dtype=float32")
    assert "max_shard_bytes" in run_command(capsys, *whole, "export.max_shard_bytes=0")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"weight_dtype": "int8", "activation_dtype": "int8", "group_size": 64, **GROUPED},
            r"w8a8 g64 \(model.layers.0.self_attn.q_proj\).*per_channel",
        ),
        (
            {"weight_dtype": "int4", "group_size": 32, **GROUPED},
            r"w4a16 g32 \(model.layers.0.mlp.down_proj, 112 columns\).*short",
        ),
    ],
)
def test_scheme_without_a_place_is_refused_by_name(fields, says, tmp_path):
    source = write_checkpoint(tmp_path / "source")
    scheme = QuantScheme(quant_method="rtn", **fields)
    prepared = prepare(source, tmp_path / "tp2", 2, scheme)
    with pytest.raises(CheckpointError, match=says):
        export(prepared, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_int8_kv_cache_is_refused_by_name(source):
    layout = open_checkpoint(source).layout(RTN)
    cached = SimpleNamespace(kvcache_dtype="int8", kvcache_quant_granularity="per_token")
    with pytest.raises(CheckpointError, match="KV cache with a scale per_token"):
        check_exportable(replace(layout, scheme=cached))
