"""Indexes and manifests that lie: a sentence, and nothing outside the directory is read as weights."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.checkpoint.open import describe_layout, open_checkpoint
from parallel.checkpoint.readers.huggingface import INDEX_NAME
from parallel.errors import CheckpointError, ModelError
from quant.errors import QuantError
from quant.scheme import QuantScheme
from tests.checkpoints import write_checkpoint
from tests.test_prepared import merged, prepare

HEAD = "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"
FILES = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
Edit = Callable[[Any], object]


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    write_checkpoint(folder / "sharded", num_files=3, vocab_size=64)
    prepare(folder / "sharded", folder / "prepared", 2)
    return folder


@pytest.fixture
def sharded(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals / "sharded", tmp_path / "checkpoint"))


@pytest.fixture
def prepared(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals / "prepared", tmp_path / "checkpoint"))


def edit_json(path: Path, edit: Edit) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def refusal(path: Path) -> str:
    """The sentence that opening ends with."""
    with pytest.raises((CheckpointError, ModelError, QuantError)) as refused:
        open_checkpoint(path).layout(QuantScheme())
    assert len(str(refused.value)) < 1000
    return str(refused.value)


def mapped(name: str, file: object) -> Edit:
    return lambda index: index["weight_map"].update({name: file})


BAD_INDEXES: dict[str, Edit] = {
    "shard one above": mapped(HEAD, "../model.safetensors"),
    "absolute shard": mapped(HEAD, "/etc/passwd"),
    "shard in a folder": mapped(HEAD, "sub/model.safetensors"),
    "shard in this folder": mapped(HEAD, "./" + FILES[0]),
    "shard with a slash behind": mapped(HEAD, FILES[0] + "/"),
    "shard that is the folder": mapped(HEAD, "."),
    "shard that is the folder above": mapped(HEAD, ".."),
    "shard of no name": mapped(HEAD, ""),
    "shard with a zero byte": mapped(HEAD, "a\0b"),
    "shard of half a character": mapped(HEAD, "\ud800"),
    "shard of a name beyond the limit": mapped(HEAD, "a" * 5000),
    "shard of a number": mapped(HEAD, 1),
    "shard of a list": mapped(HEAD, [FILES[0]]),
    "shard of null": mapped(HEAD, None),
    "tensor in another shard": mapped(HEAD, FILES[2]),
    "tensor that is nowhere": mapped("foo", FILES[0]),
    "shard that is not there": mapped(HEAD, "model-00004-of-00003.safetensors"),
    "map of lists": lambda index: index.update(weight_map=[[HEAD, FILES[0]]]),
    "map of text": lambda index: index.update(weight_map=FILES[0]),
    "empty map": lambda index: index.update(weight_map={}),
    "no map": lambda index: index.pop("weight_map"),
    "shard that is the config": mapped(HEAD, "config.json"),
    "shard that is the index": mapped(HEAD, INDEX_NAME),
}


@pytest.mark.parametrize("fact", BAD_INDEXES, ids=lambda fact: fact.replace(" ", "_"))
def test_index_that_lies_is_refused(sharded, fact):
    edit_json(sharded / INDEX_NAME, BAD_INDEXES[fact])
    assert str(sharded) in refusal(sharded)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


SPECIAL = {
    "directory": replaced(os.mkdir),
    "pipe": replaced(os.mkfifo),
    "link to itself": replaced(lambda path: os.symlink(path, path)),
    "link to nothing": replaced(lambda path: os.symlink("nowhere", path)),
    "link to a device": replaced(lambda path: os.symlink("/dev/zero", path)),
    "link to another kind of file": replaced(lambda path: os.symlink("/etc/passwd", path)),
    "link to a folder": replaced(lambda path: os.symlink("/etc", path)),
    "empty file": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("fact", SPECIAL, ids=lambda fact: fact.replace(" ", "_"))
@pytest.mark.parametrize("name", [FILES[1], INDEX_NAME, "config.json"])
def test_what_is_no_file_of_its_kind_is_refused_and_never_waited_for(sharded, fact, name):
    SPECIAL[fact](sharded / name)
    assert str(sharded) in refusal(sharded)


def test_shards_that_are_links_into_a_cache_are_read(sharded, tmp_path):
    """As the Hugging Face hub lays out what it has downloaded."""
    expected = weights_of(sharded)
    for name in FILES:
        blob = tmp_path / "blobs" / name
        blob.parent.mkdir(exist_ok=True)
        (sharded / name).rename(blob)
        (sharded / name).symlink_to(Path("..") / "blobs" / name)
    found = weights_of(sharded)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    source = open_checkpoint(path).source
    return {
        name: source.read(name, tuple(slice(0, length) for length in info.shape))
        for name, info in source.tensors.items()
    }


def test_one_file_under_two_names_is_one_tensor_twice(sharded):
    (sharded / FILES[1]).unlink()
    (sharded / FILES[1]).symlink_to(FILES[0])
    assert "remove one of them" in refusal(sharded)


@pytest.mark.parametrize("other", [FILES[0], "../../etc/passwd"])
def test_name_that_stands_twice_in_an_index_is_refused(sharded, other):
    """json keeps the last; another reader may keep the first."""
    text = (sharded / INDEX_NAME).read_text()
    (sharded / INDEX_NAME).write_text(
        text.replace('"weight_map": {', f'"weight_map": {{"model.norm.weight": "{other}",')
    )
    assert "'model.norm.weight' stands twice" in refusal(sharded)


def test_index_of_gigabytes_is_not_read(sharded, monkeypatch):
    os.truncate(sharded / INDEX_NAME, 3 << 30)  # sparse
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(CheckpointError, match="at most"):
        describe_layout_of(sharded)


def describe_layout_of(path: Path) -> None:
    from parallel.checkpoint.readers.huggingface import read_index

    read_index(path / INDEX_NAME)


def shards(name: str, rank: int, **values: Any) -> Edit:
    return lambda manifest: manifest["tensors"][name]["shards"][rank].update(values)


def tensor(name: str, **values: Any) -> Edit:
    return lambda manifest: manifest["tensors"][name].update(values)


def top(**values: Any) -> Edit:
    return lambda manifest: manifest.update(values)


BAD_MANIFESTS: dict[str, Edit] = {
    "another shape": tensor(UP, shape=[64, 112]),
    "shape of another rank": tensor(UP, shape=[112, 64, 1]),
    "shape without end": tensor(UP, shape=[2**62, 2**62]),
    "negative shape": tensor(UP, shape=[-112, -64]),
    "shape as text": tensor(UP, shape="112x64"),
    "dtype of as many bytes": tensor(UP, dtype="uint8"),
    "dtype that is none": tensor(UP, dtype="float8"),
    "dtype of no text": tensor(UP, dtype=["int8"]),
    "slices changed over": lambda manifest: manifest["tensors"][UP]["shards"].reverse(),
    "slice that overlaps": shards(UP, 1, slice=[[28, 84], [0, 64]]),
    "slice beyond the shape": shards(UP, 1, slice=[[112, 168], [0, 64]]),
    "slice backwards": shards(UP, 1, slice=[[112, 56], [0, 64]]),
    "slice of one axis": shards(UP, 1, slice=[[56, 112]]),
    "slice of numbers": shards(UP, 1, slice=[56, 112]),
    "slice of truths": shards(UP, 0, slice=[[False, 56], [False, 64]]),
    "slice of null": shards(UP, 0, slice=None),
    "no shards": tensor(UP, shards=[]),
    "shards as a mapping": tensor(UP, shards={"0": {}, "1": {}}),
    "shards as text": tensor(UP, shards="ab"),
    "tensor missing": lambda manifest: manifest["tensors"].pop(UP),
    "tensor of null": lambda manifest: manifest["tensors"].update({UP: None}),
    "tensor too many": lambda manifest: manifest["tensors"].update(
        {"foo": manifest["tensors"][UP]}
    ),
    "no tensors": top(tensors={}),
    "tensors as a list": top(tensors=[]),
    "one rank fewer": top(mesh={"tp": 1}),
    "ranks without end": top(mesh={"tp": 10**15}),
    "ranks without end and no tensors": top(mesh={"tp": 10**15}, tensors={}),
    "some of ranks without end": top(mesh={"tp": 10**15}, ranks=[0, 1]),
    "half a rank": top(mesh={"tp": 1.5}),
    "rank as a truth": top(mesh={"tp": True}),
    "another axis": top(mesh={"tp": 2, "pp": 2}),
    "rank beyond the mesh": top(ranks=[0, 2]),
    "rank without a sum": lambda manifest: manifest["tensors"][UP]["shards"][1].pop("sha256"),
    "not complete": top(complete=False),
    "complete as text": top(complete="true"),
    "another scheme": lambda manifest: manifest["scheme"].update(weight_dtype="int4"),
    "scheme of another key": lambda manifest: manifest["scheme"].update(foo=1),
    "scheme of null": top(scheme=None),
    "source as text": top(source="here"),
    "embedding elsewhere": top(vocab_emb_dp=True),
    "another format": top(format="other"),
    "another version": top(version=2),
    "version as a truth": top(version=True),
}


@pytest.mark.parametrize("fact", BAD_MANIFESTS, ids=lambda fact: fact.replace(" ", "_"))
def test_manifest_that_lies_is_refused(prepared, fact):
    edit_json(prepared / "manifest.json", BAD_MANIFESTS[fact])
    assert str(prepared) in refusal(prepared)


def fuzz(path: Path, num_changes: int, attempt: Callable[[], object]) -> int:
    """How many of so many damaged copies of a text file were opened all the same; the others ended
    in a sentence, as any other exception is the test's failure."""
    rng, data, num_opened = random.Random(0), path.read_bytes(), 0
    for _ in range(num_changes):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 2, 5))):
            at = rng.randrange(len(data))
            damaged[at : at + rng.choice((0, 1, 1, 20))] = rng.choice(
                (bytes([rng.randrange(256)]), *(bytes([c]) for c in b'0123456789"[]{},:-.e'))
            )
        path.write_bytes(damaged)
        try:
            attempt()
        except (CheckpointError, ModelError, QuantError):
            continue
        num_opened += 1
    return num_opened


def test_hundreds_of_damaged_manifests_are_refused_or_read_as_the_same_tensors(prepared):
    expected = merged(prepared)

    def attempt() -> None:
        open_checkpoint(prepared).layout(QuantScheme())
        found = merged(prepared)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    assert fuzz(prepared / "manifest.json", 200, attempt) > 5  # sums and the source's identity


def test_hundreds_of_damaged_indexes_are_refused_or_mean_the_same_tensors(sharded):
    expected = {name: info.shape for name, info in open_checkpoint(sharded).source.tensors.items()}

    def attempt() -> None:
        found = open_checkpoint(sharded)
        found.layout(QuantScheme())
        assert {name: info.shape for name, info in found.source.tensors.items()} == expected

    fuzz(sharded / INDEX_NAME, 400, attempt)


def test_plan_of_a_damaged_index_is_refused_too(sharded):
    """plan reads no weights: the names of the index are all that it has."""

    def attempt() -> None:
        describe_layout(sharded, QuantScheme(), {}, vocab_emb_dp=False)

    for name in FILES:
        (sharded / name).unlink()
    attempt()
    fuzz(sharded / INDEX_NAME, 200, attempt)
