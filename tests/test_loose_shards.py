"""Shards that were copied away from their manifest: known by their headers, whatever they are called."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from filecmp import cmp
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from launcher.__main__ import main
from launcher.resolve import checkpoint_path
from launcher.schema import Config
from parallel.checkpoint.open import open_checkpoint, own_size
from parallel.checkpoint.readers.loose_shards import LooseShards
from parallel.checkpoint.readers.prepared import PreparedSource
from parallel.checkpoint.readers.shard_header import is_shard
from parallel.checkpoint.store import write_prepared
from parallel.errors import CheckpointError
from quant.scheme import QuantScheme
from tests.checkpoints import CONFIG, write_checkpoint
from tests.models import RTN
from tests.test_prepared import prepare

SCHEMES = {
    "float": QuantScheme(),
    "w8a16": RTN,
    "w4a16 mixed": QuantScheme(
        quant_method="rtn",
        weight_dtype="int4",
        weight_quant_granularity="per_group",
        group_size=32,
        layer_policies=({"pattern": "down_proj", "weight_dtype": "int8", "group_size": None,
                         "weight_quant_granularity": "per_channel"},),
    ),
}  # fmt: skip
MODEL_CONFIG = {
    "hidden_size": 64, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2, "vocab_size": 2048,
    "intermediate_size": 112, "max_position_embedding": 128, "rms_norm_eps": 1e-5,
    "compute_dtype": "float32",
}  # fmt: skip
QUANTIZATION = {
    "quant_method": "rtn", "weight_dtype": "int8", "activation_dtype": "None",
    "kvcache_dtype": "None", "outliers_suppression": "None", "modules_to_not_convert": ["lm_head"],
    "algorithm_args": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("loose") / "source")


@pytest.fixture(scope="module")
def prepared(source) -> Any:
    """prepared(scheme's name, size): the directory, made once."""
    made: dict[tuple[str, int], Path] = {}

    def make(name: str, size: int) -> Path:
        if (name, size) not in made:
            output = source.parent / f"{name}-{size}"
            made[name, size] = prepare(source, output, size, SCHEMES[name])
        return made[name, size]

    return make


def write_yaml(folder: Path, quantization: Mapping[str, Any] | None = None, **changed: Any) -> None:
    """MindFormers' YAML of the model."""
    config: dict[str, Any] = {**MODEL_CONFIG, **changed}
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    model = {"model_config": config, "arch": {"type": "LlamaForCausalLM"}}
    folder.mkdir(exist_ok=True)
    (folder / "predict.yaml").write_text(yaml.safe_dump({"model": model}))


def loose(prepared: Path, folder: Path, *names: str) -> Path:
    """A directory with the YAML of the model, and the shard of each rank under another name."""
    write_yaml(folder)
    for rank, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(prepared / f"rank_{rank}" / "model.safetensors", folder / name)
    return folder


def merged(source: Any) -> dict[str, torch.Tensor]:
    return {
        name: source.read(name, tuple(slice(0, length) for length in info.shape))
        for name, info in source.tensors.items()
    }


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


# --------------------------------------------------------------------------------------- they are read


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "names",
    [
        ("llama2_13b_rtn_a16w8.ckpt",),
        ("any.safetensors",),
        ("rank_0/rtn-a16w8.ckpt", "rank_1/rtn-a16w8.ckpt"),
        ("rank_0/model.safetensors", "rank_1/model.safetensors"),
        ("second name.ckpt", "a first one.ckpt"),
    ],
)
def test_copied_shards_hold_the_tensors_of_the_directory_they_are_from(
    prepared, tmp_path, scheme, names
):
    whole = prepared(scheme, len(names))
    checkpoint = open_checkpoint(loose(whole, tmp_path / "copied", *names))
    assert isinstance(checkpoint.source, LooseShards)
    assert (checkpoint.prepared_size, checkpoint.own_scheme) == (len(names), SCHEMES[scheme])
    checkpoint.layout(QuantScheme())
    found, wanted = merged(checkpoint.source), merged(PreparedSource(whole))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_size_of_copied_shards_is_known(prepared, tmp_path):
    names = ("rank_0/x.ckpt", "rank_1/x.ckpt")
    assert own_size(loose(prepared("w8a16", 2), tmp_path / "two", *names)) == 2
    assert own_size(prepared("w8a16", 2)) == 2
    assert own_size(tmp_path) is None


def test_the_scheme_may_be_said_by_the_yaml_beside_too(prepared, tmp_path):
    folder = loose(prepared("w8a16", 1), tmp_path / "copied", "x.ckpt")
    write_yaml(folder, QUANTIZATION)
    assert open_checkpoint(folder).own_scheme == RTN


def test_a_config_json_says_the_shape_as_well(prepared, tmp_path):
    folder = loose(prepared("w8a16", 1), tmp_path / "copied", "x.ckpt")
    (folder / "predict.yaml").unlink()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "float32"}))
    assert open_checkpoint(folder).own_scheme == RTN


def test_resharding_copied_shards_gives_the_bytes_of_preparing_the_original(prepared, tmp_path):
    copied = open_checkpoint(loose(prepared("w8a16", 1), tmp_path / "copied", "x.ckpt"))
    output = tmp_path / "two"
    write_prepared(copied.layout(QuantScheme()), copied.source, 2, output)
    for rank in ("rank_0", "rank_1"):
        shard = prepared("w8a16", 2) / rank / "model.safetensors"
        assert cmp(output / rank / "model.safetensors", shard, shallow=False)


@pytest.mark.parametrize("is_linked", [True, False])
def test_two_names_of_one_file_are_one_shard(prepared, tmp_path, is_linked):
    folder = loose(prepared("w8a16", 1), tmp_path / "copied", "rank_0/model.safetensors")
    other = folder / "rank_0" / "rtn-a16w8.ckpt"
    if is_linked:
        other.symlink_to("model.safetensors")
        assert open_checkpoint(folder).prepared_size == 1
    else:
        shutil.copy(folder / "rank_0" / "model.safetensors", other)
        assert "are both of rank 0; keep one of them." in refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "rtn-a16w8.ckpt"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_shard_in_its_own_directory_names_all_of_it(prepared, tmp_path, name, size):
    whole = Path(shutil.copytree(prepared("w8a16", size), tmp_path / "whole"))
    if name != "model.safetensors":
        (whole / "rank_0" / name).symlink_to("model.safetensors")
    assert checkpoint_path(Config(checkpoint=str(whole / "rank_0" / name))) == whole


def test_a_copied_shard_alone_in_a_directory_names_it(prepared, tmp_path):
    folder = loose(prepared("w8a16", 1), tmp_path / "copied", "x.ckpt")
    assert checkpoint_path(Config(checkpoint=str(folder / "x.ckpt"))) == folder


# ------------------------------------------------------------------------------------- they are refused


def test_one_shard_of_several_is_refused_by_its_rank_and_size(prepared, tmp_path):
    folder = loose(prepared("w8a16", 2), tmp_path / "copied", "x.ckpt")
    assert refusal(folder) == (
        f"{folder / 'x.ckpt'} is the shard of rank 0 of 2, which alone is no model; copy the shards of "
        f"all ranks, with their directories rank_0 to rank_1, to {folder}, or give the directory that "
        "prepare wrote."
    )


def test_shards_of_which_one_is_missing_are_refused(prepared, tmp_path):
    folder = loose(prepared("w8a16", 4), tmp_path / "copied", "a.ckpt", "b.ckpt", "c.ckpt")
    assert "belongs to 4 shards, of which those of ranks 0, 1, 2 are there" in refusal(folder)


def test_a_yaml_of_another_scheme_is_refused_by_the_key_that_differs(prepared, tmp_path):
    folder = loose(prepared("w8a16", 1), tmp_path / "copied", "x.ckpt")
    write_yaml(folder, {**QUANTIZATION, "modules_to_not_convert": ["lm_head", "w2"]})
    assert refusal(folder) == (
        f"{folder} holds shards that were prepared as w8a16, but predict.yaml says w8a16 "
        "(modules_to_not_convert ['lm_head'], not ['lm_head', 'w2']); use the YAML of their scheme."
    )


def test_another_scheme_on_the_command_line_is_refused(prepared, tmp_path):
    folder = loose(prepared("w8a16", 1), tmp_path / "copied", "x.ckpt")
    with pytest.raises(
        CheckpointError, match=r"asks for w4a16 \(weight_dtype 'int8', not 'int4'\)"
    ):
        open_checkpoint(folder).layout(QuantScheme(quant_method="rtn", weight_dtype="int4"))


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"num_layers": 1}, "but the config asks for no such tensor"),
        ({"num_layers": 3}, "model.layers.2.input_layernorm.weight is missing, but the config"),
        ({"intermediate_size": 128}, "is int8 [64, 112], but the config asks for int8 [64, 128]"),
    ],
)
def test_a_yaml_of_another_shape_is_refused_by_the_first_tensor(prepared, tmp_path, changed, what):
    folder = loose(prepared("w8a16", 1), tmp_path / "copied", "x.ckpt")
    write_yaml(folder, **changed)
    assert what in refusal(folder)
    assert f"{folder / 'x.ckpt'} is a shard of another model" in refusal(folder)


def test_a_shard_beside_other_weights_is_refused(prepared, tmp_path):
    folder = loose(prepared("w8a16", 1), tmp_path / "copied", "x.ckpt")
    save_file({"a": torch.zeros(1)}, folder / "y.safetensors")
    assert "x.ckpt is a shard that prepare wrote, and y.safetensors is none" in refusal(folder)


@pytest.mark.parametrize("other", ["float", "w4a16 mixed"])
def test_shards_of_two_schemes_are_refused(prepared, tmp_path, other):
    folder = loose(prepared("w8a16", 2), tmp_path / "copied", "rank_0/x.ckpt", "rank_1/x.ckpt")
    shutil.copy(prepared(other, 2) / "rank_1" / "model.safetensors", folder / "rank_1" / "x.ckpt")
    assert "were not prepared together; keep those of one." in refusal(folder)


def test_shards_of_two_sizes_are_refused(prepared, tmp_path):
    folder = loose(prepared("w8a16", 2), tmp_path / "copied", "rank_0/x.ckpt", "rank_1/x.ckpt")
    shutil.copy(prepared("w8a16", 4) / "rank_1" / "model.safetensors", folder / "rank_1" / "x.ckpt")
    assert "were not prepared together" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("shardrun", "2", "is not a shard of version 1"),
        ("rank", "1", "has a damaged header"),
        ("rank", "-0", "has a damaged header"),
        ("tp", "", "has a damaged header"),
        ("tp", "9" * 5000, "has a damaged header"),
        ("tp", "٣", "has a damaged header"),
        ("vocab_emb_dp", "no", "has a damaged header"),
        ("scheme", "", "has a damaged header"),
        ("scheme", "[" * 20000, "has a damaged header"),
        ("scheme", "[]", "has a damaged header"),
        ("scheme", '{"weight_dtype":"int-8"}', "has a damaged header"),
        ("scheme", '{"modules_to_not_convert":[1]}', "has a damaged header"),
        (None, None, "has a damaged header"),
    ],
)
def test_a_damaged_header_is_refused_in_a_sentence(prepared, tmp_path, key, value, what):
    folder = loose(prepared("w8a16", 1), tmp_path / "copied", "x.safetensors")
    path = folder / "x.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    said = entries["__metadata__"]
    if key is None:
        entries["__metadata__"] = dict(itertools.islice(said.items(), 2))
    else:
        said[key] = value
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert what in refusal(folder)


# ------------------------------------------------------------------------------- what tells a shard


def test_every_shard_begins_as_one_and_nothing_else_does(prepared, source, tmp_path):
    whole = prepared("w8a16", 2)
    assert all(map(is_shard, whole.glob("rank_*/model.safetensors")))
    assert not is_shard(source / "model.safetensors")
    assert not is_shard(tmp_path)
    assert not is_shard(tmp_path / "gone")
    # Written anew by the library, with another order of the header, it is nobody's shard.
    shard = whole / "rank_0" / "model.safetensors"
    save_file(load_file(shard), tmp_path / "again.safetensors", {"format": "pt"})
    assert not is_shard(tmp_path / "again.safetensors")


def test_a_pipe_with_the_name_of_weights_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.ckpt")
    assert not is_shard(tmp_path / "x.ckpt")


# ---------------------------------------------------------------------------------------- the commands


def test_check_says_that_copied_shards_have_no_sums(prepared, tmp_path, capsys):
    folder = loose(prepared("w8a16", 1), tmp_path / "copied", "x.ckpt")
    assert main(["check", f"checkpoint={folder}"]) == 0
    assert "it has no sums, so changed values cannot be seen" in capsys.readouterr().out


def test_sums_that_copied_shards_do_not_have_cannot_be_asked_for(prepared, tmp_path, capsys):
    folder = loose(prepared("w8a16", 1), tmp_path / "copied", "x.ckpt")
    words = [f"checkpoint={folder}", "verify_checksums=true", f"output={tmp_path / 'out'}"]
    assert main(["prepare", *words]) == 2
    assert "`verify_checksums` has no effect on" in capsys.readouterr().err


def test_plan_counts_copied_shards_as_they_are(prepared, tmp_path, capsys):
    names = ("rank_0/x.ckpt", "rank_1/x.ckpt")
    tables = []
    for folder in (prepared("w8a16", 2), loose(prepared("w8a16", 2), tmp_path / "copied", *names)):
        assert main(["plan", f"checkpoint={folder}", "plan.json=true"]) == 0
        report = json.loads(capsys.readouterr().out)
        weights = {tp: size["rank_weight_bytes"] for tp, size in report["sizes"].items()}
        tables.append((report["tp"], report["scheme"], weights))
    assert tables[0] == tables[1]


def test_copied_shards_are_exported_as_their_directory_is(prepared, tmp_path):
    whole = prepared("w8a16", 1)
    copied = loose(whole, tmp_path / "copied", "x.ckpt")
    elsewhere = tmp_path / "predict.yaml"
    for output, *words in (
        ("whole", f"checkpoint={whole}"),
        ("beside", f"checkpoint={copied}"),
        ("elsewhere", f"checkpoint={copied}", f"config={elsewhere}"),
    ):
        if output == "elsewhere":
            (copied / "predict.yaml").rename(elsewhere)
        more = [f"output={tmp_path / output}", f"tokenizer={whole}"]
        assert main(["export", *words, *more]) == 0
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "beside", "elsewhere")]
    assert len({file.read_bytes() for file in files}) == 1
