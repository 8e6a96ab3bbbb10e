"""Prepared checkpoints: the same integers at every size, whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launcher.resolve import DEMO
from parallel.checkpoint.conversion import work_order
from parallel.checkpoint.open import open_checkpoint
from parallel.checkpoint.readers.prepared import PreparedSource
from parallel.checkpoint.store import write_prepared
from parallel.errors import CheckpointError
from quant.numeric import Grid
from quant.rounding import quantize
from quant.scheme import QuantScheme
from tests.checkpoints import write_checkpoint
from tests.memory import peak_kib
from tests.models import RTN, generate


def prepare(source: Path, output: Path, size: int, scheme: QuantScheme = RTN, **how) -> Path:
    checkpoint = open_checkpoint(source)
    layout = checkpoint.layout(scheme, **how)
    write_prepared(layout, checkpoint.source, size, output, num_threads=2)
    return output


def merged(path: Path) -> dict[str, torch.Tensor]:
    source = PreparedSource(path)
    return {
        name: source.read(name, tuple(slice(0, length) for length in info.shape))
        for name, info in source.tensors.items()
    }


def checksums(path: Path) -> dict[str, str]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


@pytest.fixture(scope="module", params=["demo", "stories260K", "stories260K bf16 shards"])
def source(request):
    if request.param == "demo":
        return DEMO
    folder = "hf" if request.param == "stories260K" else "hf-sharded-bf16"
    return request.getfixturevalue("shared") / "checkpoints/stories260K" / folder


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    return {size: prepare(source, folder / f"tp{size}", size) for size in (1, 2, 4, 8)}


def test_large_tensors_do_not_come_last():
    sizes = {"first": 1, "gate": 4, "down": 4, "norm": 1, "lm_head": 9}
    assert work_order(sizes, 3) == ["first", "gate", "lm_head", "down", "norm"]
    assert work_order(sizes, 99) == ["lm_head", "gate", "down", "first", "norm"]


def test_integers_and_scales_are_the_same_at_every_size(prepared):
    reference = merged(prepared[1])
    for size in (2, 4, 8):
        found = merged(prepared[size])
        assert found.keys() == reference.keys()
        assert all(torch.equal(found[name], reference[name]) for name in reference)


def test_integers_are_those_of_the_whole_weight(source, prepared):
    files = [load_file(file) for file in sorted(source.glob("*.safetensors"))]
    weights = {name: tensor for file in files for name, tensor in file.items()}
    shards = merged(prepared[4])
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
        values, scale = quantize(weights[name], Grid())
        assert torch.equal(shards[name], values)
        assert torch.equal(shards[name + "_scale"], scale)


def test_text_is_the_same_from_every_size_and_on_every_size(prepared):
    expected = generate(prepared[1], [[1]], 1, new_tokens=12)
    for size in (2, 4, 8):
        assert generate(prepared[size], [[1]], size, new_tokens=12) == expected
    assert generate(prepared[8], [[1]], 2, new_tokens=12) == expected
    assert generate(prepared[2], [[1]], 4, new_tokens=12) == expected


def test_text_is_that_of_quantizing_on_the_fly(source, prepared):
    expected = generate(source, [[1]], 2, new_tokens=12, scheme=RTN)
    assert generate(prepared[4], [[1]], 4, new_tokens=12) == expected


def test_preparing_a_prepared_one_gives_the_bytes_of_preparing_the_source(prepared, tmp_path):
    scheme = PreparedSource(prepared[2]).scheme
    again = prepare(prepared[2], tmp_path / "again", 4, scheme)
    assert checksums(again) == checksums(prepared[4])


def test_equal_inputs_give_equal_bytes(source, prepared, tmp_path):
    assert checksums(prepare(source, tmp_path / "again", 2)) == checksums(prepared[2])


def test_shards_are_read_by_the_safetensors_library_and_match_the_manifest(prepared):
    manifest = json.loads((prepared[2] / "manifest.json").read_text())
    for rank in range(2):
        for name, tensor in load_file(prepared[2] / f"rank_{rank}/model.safetensors").items():
            shard = manifest["tensors"][name]["shards"][rank]
            assert list(tensor.shape) == [stop - start for start, stop in shard["slice"]]
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert hashlib.sha256(data).hexdigest() == shard["sha256"]


def test_manifest_names_the_source_without_place_or_time(source, prepared):
    text = (prepared[2] / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["mesh"] == {"tp": 2}
    assert manifest["source"]["files"].keys() == {f.name for f in source.glob("*.safetensors")}
    assert "model.norm.weight" in manifest["source"]["tensors"]
    assert str(source) not in text


def test_unquantized_shards_and_a_replicated_embedding(tmp_path):
    plain = prepare(DEMO, tmp_path / "plain", 2, QuantScheme(), vocab_emb_dp=True)
    source = load_file(DEMO / "model.safetensors")
    assert all(torch.equal(tensor, source[name]) for name, tensor in merged(plain).items())
    embedding = load_file(plain / "rank_1/model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding, source["model.embed_tokens.weight"])


def test_tied_lm_head_is_quantized_as_a_copy_of_its_own(tmp_path):
    scheme = QuantScheme(quant_method="rtn", weight_dtype="int8", modules_to_not_convert=())
    path = prepare(DEMO, tmp_path / "head", 2, scheme)
    tensors = merged(path)
    assert tensors["lm_head.weight"].dtype == torch.int8
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert generate(path, [[1]], 2) == generate(DEMO, [[1]], 1, scheme=scheme)


def test_output_that_exists_is_never_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        prepare(DEMO, tmp_path / "out", 2)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious"]


def test_failed_prepare_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space"))
    )
    with pytest.raises(CheckpointError, match="No space"):
        prepare(DEMO, tmp_path / "out", 2)
    assert list(tmp_path.iterdir()) == []


def test_anonymous_memory_of_prepare_does_not_grow_with_the_model(tmp_path):
    """Two models of one layer shape, 2 and 12 layers: the peak is that of a few tensors."""
    script = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from tests.checkpoints import write_checkpoint
from tests.memory import watch_memory
from tests.test_prepared import prepare
root, layers = Path(sys.argv[1]), int(sys.argv[2])
write_checkpoint(root / "source", num_hidden_layers=layers, hidden_size=1024, intermediate_size=2816,
                 num_attention_heads=8, num_key_value_heads=8, dtype=torch.bfloat16)
prepare(root / "source", root / "warm", 2)
_, peak, _ = watch_memory(lambda: prepare(root / "source", root / "out", 2))
print(peak >> 10)
"""

    small, large = (peak_kib(script, tmp_path, layers) for layers in (2, 12))
    # 10 more layers are 226 MB of bfloat16. A tensor is 5.8 MB and its float32 rows 16 MB a thread;
    # the small model may be done between two looks, so the bound is that of a few tensors alone.
    assert large < small + 100_000


def test_scale_of_a_copied_head_has_the_dtype_of_the_file_not_of_the_config(tmp_path):
    """A config.json that says another dtype once made scales overrun their place in the shard."""
    source = write_checkpoint(
        tmp_path / "source", dtype=torch.float32, torch_dtype="bfloat16", tie_word_embeddings=True
    )
    scheme = QuantScheme(quant_method="rtn", weight_dtype="int8", modules_to_not_convert=())
    path = prepare(source, tmp_path / "out", 2, scheme)
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    values, scale = quantize(embedding, Grid())
    tensors = merged(path)
    assert torch.equal(tensors["lm_head.weight"], values)
    assert torch.equal(tensors["lm_head.weight_scale"], scale)


def test_overrides_of_the_config_stay_with_the_prepared_directory(tmp_path):
    checkpoint = open_checkpoint(DEMO, {"rope_theta": 500000.0})
    write_prepared(
        checkpoint.layout(RTN), checkpoint.source, 1, tmp_path / "out",
        overrides={"rope_theta": 500000.0},
    )  # fmt: skip
    assert open_checkpoint(tmp_path / "out").config.rope_theta == 500000.0
