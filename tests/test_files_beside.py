"""Directories as people have them: which files are read, and by which names, as in transformers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.checkpoint.export import write_export
from parallel.checkpoint.open import describe_layout, open_checkpoint
from parallel.checkpoint.plan_disk import prepared_bytes, weight_files
from parallel.checkpoint.side_files import side_files
from parallel.errors import CheckpointError
from parallel.model.placements import HEAD
from quant.scheme import QuantScheme
from tests.checkpoints import CONFIG, random_weights, write_checkpoint, write_weights
from tests.test_prepared import prepare
from tests.test_tied_head import check_logits, their_logits

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def other_weights(path: Path, name: str) -> None:
    """Weights of the same names and other values."""
    save_file(random_weights(CONFIG, torch.float32, 7), path / name)


def optimizer(path: Path, name: str) -> None:
    save_file({"state.0.exp_avg": torch.ones(3)}, path / name)


def stale_index(path: Path, name: str) -> None:
    names = random_weights(CONFIG, torch.float32, 0)
    shard = name.replace("index.json", "gone")
    (path / name).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))


def other_pickle(path: Path, name: str) -> None:
    torch.save(random_weights(CONFIG, torch.float32, 7), path / name)


BESIDE: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "consolidated": (other_weights, "consolidated.safetensors"),
    "optimizer": (optimizer, "optimizer.safetensors"),
    "adapter": (optimizer, "adapter_model.safetensors"),
    "index of shards that are gone": (stale_index, INDEX),
    "index of pickles that are gone": (stale_index, BIN_INDEX),
    "pickle": (other_pickle, BIN),
}


SAME_FILE = (("shards", "index of shards that are gone"), ("bin", "pickle"))
# Where transformers takes what lies beside: safetensors before pickles.
GOES_BEFORE = ("bin", "index of shards that are gone")
CASES = [
    (form, beside)
    for form in ("single", "shards", "bin")
    for beside in BESIDE
    if (form, beside) not in (*SAME_FILE, GOES_BEFORE)
]


def write_form(path: Path, form: str) -> Path:
    write_checkpoint(path, num_files=3 if form == "shards" else 1)
    if form == "bin":
        torch.save(load_file(path / SINGLE), path / BIN)
        (path / SINGLE).unlink()
    return path


@pytest.mark.parametrize(("form", "beside"), CASES)
def test_weights_go_before_what_lies_beside_them_as_in_transformers(tmp_path, form, beside):
    path = write_form(tmp_path / "source", form)
    write, name = BESIDE[beside]
    expected = {file.name for file in weight_files(path)}
    write(path, name)
    check_logits(path, their_logits(path))
    assert {info.file for info in open_checkpoint(path).source.tensors.values()} == expected
    assert {file.name for file in weight_files(path)} == expected
    describe_layout(path, QuantScheme(), {}, vocab_emb_dp=False)


def test_an_index_of_safetensors_goes_before_a_pickle(tmp_path):
    form, beside = GOES_BEFORE
    path = write_form(tmp_path / "source", form)
    write, name = BESIDE[beside]
    write(path, name)
    with pytest.raises(CheckpointError, match="gone is missing"):
        open_checkpoint(path)


def test_several_files_of_unknown_names_are_refused_with_what_would_tell_them(tmp_path):
    path = write_checkpoint(tmp_path)
    (path / SINGLE).rename(path / "one.safetensors")
    optimizer(path, "two.safetensors")
    with pytest.raises(CheckpointError, match=f"2 safetensors files, but none is {SINGLE}, and"):
        open_checkpoint(path)


def test_one_file_of_any_name_is_read(tmp_path):
    path = write_checkpoint(tmp_path)
    (path / SINGLE).rename(path / "llama.safetensors")
    assert open_checkpoint(path).source.tensors[HEAD].file == "llama.safetensors"


def test_an_adapter_alone_is_refused_as_one(tmp_path):
    path = write_checkpoint(tmp_path)
    (path / SINGLE).unlink()
    optimizer(path, "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds an adapter alone .* merge it"):
        open_checkpoint(path)


def test_an_adapter_beside_the_weights_is_said_not_to_be_applied(tmp_path):
    path = write_checkpoint(tmp_path)
    assert open_checkpoint(path).notes == ()
    (path / "adapter_config.json").write_text("{}")
    optimizer(path, "adapter_model.safetensors")
    (note,) = open_checkpoint(path).notes
    assert "adapter_config.json) is not applied" in note


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_index_of_safetensors_that_points_elsewhere_is_refused(tmp_path, file):
    path = write_checkpoint(tmp_path, num_files=2)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"][HEAD] = file
    (path / INDEX).write_text(json.dumps(index))
    for read in (open_checkpoint, plan):
        with pytest.raises(CheckpointError, match="not a file name in its own directory"):
            read(path)


def plan(path: Path) -> None:
    describe_layout(path, QuantScheme(), {}, vocab_emb_dp=False)


def without_prefix(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_names_of_a_bare_decoder_are_those_of_the_model(tmp_path, tied, num_files):
    """As AutoModel.save_pretrained writes them, whose config.json names the bare decoder."""
    path = write_checkpoint(
        tmp_path / "source", architectures=["LlamaModel"], tie_word_embeddings=tied
    )
    (path / SINGLE).unlink()
    config = {**CONFIG, "tie_word_embeddings": tied}
    write_weights(path, without_prefix(random_weights(config, torch.float32, 0)), num_files)
    check_logits(path, their_logits(path))
    describe_layout(path, QuantScheme(), {}, vocab_emb_dp=False)
    prepared = prepare(path, tmp_path / "tp2", 2)
    assert open_checkpoint(prepared).layout(QuantScheme())


def test_a_tensor_with_and_without_prefix_is_refused(tmp_path):
    path = write_checkpoint(tmp_path)
    weights = random_weights(CONFIG, torch.float32, 0)
    write_weights(path, weights | {"norm.weight": torch.ones(64)})
    with pytest.raises(CheckpointError, match=r"with and without `model.`"):
        open_checkpoint(path)


def test_a_tensor_of_float64_is_refused_with_the_dtypes_that_are_read(tmp_path):
    path = write_checkpoint(tmp_path)
    weights = random_weights(CONFIG, torch.float32, 0)
    write_weights(path, weights | {HEAD: weights[HEAD].double()})
    with pytest.raises(CheckpointError, match=r"must have one of the dtypes F32, .* but has F64"):
        open_checkpoint(path)


# config.json


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", "auto", None])
def test_dtype_is_read_in_each_of_its_forms_and_looked_up_where_it_is_left_open(
    tmp_path, key, name
):
    path = write_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    config = json.loads((path / "config.json").read_text())
    del config["torch_dtype"]
    (path / "config.json").write_text(json.dumps({**config, key: name}))
    assert open_checkpoint(path, {"torch_dtype": "float16"}).config.dtype == "float16"
    for found in (path, prepare(path, tmp_path / "tp2", 2)):
        assert open_checkpoint(found).config.dtype == "bfloat16"
        planned = describe_layout(found, QuantScheme(), {}, vocab_emb_dp=False)
        assert planned.config.dtype == "bfloat16"


# Chat templates


def with_templates(path: Path) -> Path:
    write_checkpoint(path)
    (path / "chat_template.jinja").write_text("default")
    (path / "chat_template.json").write_text('{"chat_template": "old"}')
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (path / "additional_chat_templates" / "notes.txt").write_text("not a template")
    return path


def templates(path: Path) -> dict[str, str]:
    return {
        file.relative_to(path).as_posix(): file.read_text()
        for file in sorted(path.rglob("*chat_template*/*")) + sorted(path.glob("chat_template*"))
    }


def test_prepare_and_export_copy_the_chat_templates(tmp_path):
    source = with_templates(tmp_path / "source")
    prepared = prepare(source, tmp_path / "tp2", 2, QuantScheme())
    checkpoint = open_checkpoint(prepared)
    layout = checkpoint.layout(QuantScheme())
    write_export(layout, checkpoint.source, tmp_path / "hf", max_shard_bytes=1 << 30)
    wanted = templates(source)
    assert wanted.pop("additional_chat_templates/notes.txt")
    assert len(wanted) == 3
    assert templates(prepared) == templates(tmp_path / "hf") == wanted
    sizes = sum(file.stat().st_size for file in prepared.rglob("*") if file.is_file())
    assert sizes < prepared_bytes(layout, 2, source=source)


def linked_folder(path: Path) -> None:
    shutil.move(path / "additional_chat_templates", path.parent / "elsewhere")
    (path / "additional_chat_templates").symlink_to(path.parent / "elsewhere")


def pipe(path: Path) -> None:
    os.mkfifo(path / "additional_chat_templates" / "pipe.jinja")


def long_template(path: Path) -> None:
    with (path / "additional_chat_templates" / "long.jinja").open("wb") as file:
        file.truncate(3 << 30)  # sparse


def too_many(path: Path) -> None:
    for number in range(101):
        (path / "additional_chat_templates" / f"{number}.jinja").touch()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (linked_folder, "is a link"),
        (pipe, "must be a regular file"),
        (long_template, "at most 1,048,576 bytes"),
        (too_many, "at most 100 templates"),
    ],
)
def test_templates_that_lead_elsewhere_or_have_no_end_are_refused(tmp_path, damage, says):
    source = with_templates(tmp_path / "source")
    damage(source)
    with pytest.raises(CheckpointError, match=says):
        prepare(source, tmp_path / "tp2", 2)
    assert not (tmp_path / "tp2").exists()


def test_a_file_of_the_templates_name_is_none(tmp_path):
    (tmp_path / "additional_chat_templates").write_text("a file")
    assert side_files(tmp_path) == {}
