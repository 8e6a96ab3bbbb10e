"""check: every changed byte is found and named, and what is whole is said to be."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from launcher.__main__ import main
from launcher.tasks import checksums, rank_task
from parallel.checkpoint.open import open_checkpoint
from parallel.checkpoint.readers.prepared import PreparedSource
from parallel.checkpoint.store import write_prepared
from parallel.checkpoint.sums import check_shards, list_pieces, wrong_pieces
from parallel.errors import CheckpointError
from quant.scheme import QuantScheme
from tests.checkpoints import write_checkpoint
from tests.mindspore_checkpoints import to_mindformers, write_ckpt
from tests.models import RTN, generate
from tests.test_prepared import prepare

SIZE = 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return prepare(write_checkpoint(folder / "source"), folder / "prepared", SIZE)


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def check(capsys, path: Path, *words: str) -> tuple[int, str, str]:
    return main(["check", f"checkpoint={path}", *words]), *capsys.readouterr()


def flip(path: Path, offset: int) -> None:
    """Turn one bit over, in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << random.Random(offset).randrange(8)]))


@pytest.fixture
def second_rank(whole, tmp_path) -> Path:
    """The shard of rank 1 alone."""
    checkpoint = open_checkpoint(whole.parent / "source")
    output = tmp_path / "second"
    write_prepared(checkpoint.layout(RTN), checkpoint.source, SIZE, output, ranks=[1])
    return output


def test_whole_directory_is_all_good_and_its_speed_is_said(capsys, whole):
    status, out, err = check(capsys, whole)
    assert (status, err) == (0, "")
    count = sum(len(PreparedSource(whole).file(rank).tensors) for rank in range(SIZE))
    assert f"all good, {count} sums of all ranks' shards" in out
    assert "GB/s" in out
    assert "without a sum, only looked at: config.json, tokenizer.model" in out


def test_every_byte_of_every_shard_has_a_sum(whole):
    source = PreparedSource(whole)
    for rank in range(SIZE):
        pieces = [piece for piece in list_pieces(source, [rank]) if piece.num_bytes]
        path = source.file(rank).path
        position = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        for piece in pieces:
            assert piece.offset == position
            position += piece.num_bytes
        assert position == path.stat().st_size


def test_any_changed_bit_is_found_in_its_tensor_and_rank(copied):
    source = PreparedSource(copied)
    pieces = list_pieces(source, source.ranks)
    rng = random.Random(1)
    for piece in rng.sample(pieces, 25):
        offset = piece.offset + rng.randrange(piece.num_bytes)
        flip(piece.path, offset)
        assert wrong_pieces(pieces, num_threads=2) == [piece]
        flip(piece.path, offset)
    assert wrong_pieces(pieces, num_threads=2) == []


def test_blocks_of_any_size_give_the_same_sums(whole, monkeypatch):
    source = PreparedSource(whole)
    pieces = list_pieces(source, source.ranks)
    monkeypatch.setattr("parallel.checkpoint.sums._BLOCK_BYTES", 1000)
    read: list[int] = []
    assert wrong_pieces(pieces, 2, read.append) == []
    assert sum(read) == sum(piece.num_bytes for piece in pieces)
    assert max(read) == 1000


def test_wrong_sums_are_all_counted_and_named_by_file(capsys, copied):
    source = PreparedSource(copied)
    for rank, count in ((0, 7), (1, 1)):
        for piece in list_pieces(source, [rank])[:count]:
            flip(piece.path, piece.offset)
    status, out, err = check(capsys, copied)
    assert (status, out) == (1, "")
    assert "rank_0/model.safetensors has 7 wrong sums" in err
    assert "and 2 more" in err
    assert f"rank_1/model.safetensors has 1 wrong sum ({list_pieces(source, [1])[0].name})" in err


def test_a_link_to_a_shard_is_no_shard_of_its_own(capsys, copied):
    (copied / "rank_0" / "rtn-a16w8.ckpt").symlink_to("model.safetensors")
    status, out, _ = check(capsys, copied)
    assert status == 0
    assert ": all good, " in out


@pytest.mark.parametrize("target", ["../rank_7.safetensors", "loop.ckpt"])
def test_a_link_to_anything_else_is_a_fault(capsys, copied, target):
    (copied / "rank_0" / "loop.ckpt").symlink_to(target)
    status, _, err = check(capsys, copied)
    assert status == 1
    assert "its manifest does not list rank_0/loop.ckpt" in err


@pytest.mark.parametrize(
    "stray", ["rank_0/model-2.safetensors", "rank_7/model.safetensors", "model.safetensors"]
)
def test_weights_that_the_manifest_does_not_list_are_a_fault(capsys, copied, stray):
    (copied / stray).parent.mkdir(exist_ok=True)
    (copied / stray).write_bytes(b"")
    status, _, err = check(capsys, copied)
    assert status == 1
    assert f"its manifest does not list {stray.removesuffix('/model.safetensors')}" in err


def test_other_files_beside_are_said_to_have_no_sum(capsys, copied):
    (copied / "LICENSE").write_text("mine")
    status, out, _ = check(capsys, copied)
    assert status == 0
    assert out.rstrip().endswith("LICENSE")


def test_file_that_was_cut_after_it_was_opened_has_wrong_sums(copied):
    source = PreparedSource(copied)
    pieces = list_pieces(source, [0])
    os.truncate(pieces[-1].path, pieces[-1].offset)
    assert pieces[-1] in wrong_pieces(pieces, num_threads=1)


def test_shards_of_some_ranks_are_checked_alone(capsys, second_rank):
    status, out, _ = check(capsys, second_rank)
    assert status == 0
    assert "of 1 of 2 ranks' shards" in out
    piece = list_pieces(PreparedSource(second_rank), [1])[0]
    flip(piece.path, piece.offset)
    assert check(capsys, second_rank)[0] == 1


def test_a_rank_that_is_here_reads_what_it_would_of_all(whole, second_rank):
    layout = open_checkpoint(whole).layout(QuantScheme())
    all_ranks, alone = open_checkpoint(whole).source, open_checkpoint(second_rank).source
    for tensor in layout.tensors:
        index = tensor.index(1, SIZE)
        assert torch.equal(alone.read(tensor.name, index), all_ranks.read(tensor.name, index))


def test_a_rank_that_is_not_here_is_missed_by_who_needs_it(second_rank):
    with pytest.raises(CheckpointError, match=r"shards of ranks 1 of 2 only"):
        generate(second_rank, [[1]], 1)


@pytest.mark.parametrize("ranks", [[], [2], [-1], [0, 0], "0", [True], {"0": 1}, 0, None])
def test_ranks_that_are_none_are_refused(capsys, copied, ranks):
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, "ranks": ranks}))
    status, out, err = check(capsys, copied)
    assert (status, out) == (2, "")
    assert "manifest.json is damaged" in err


@pytest.mark.parametrize("sum_", [None, "", "0" * 63, "G" * 64, 5])
def test_sum_that_is_none_is_refused(capsys, copied, sum_):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["tensors"]["model.norm.weight"]["shards"][0]["sha256"] = sum_
    (copied / "manifest.json").write_text(json.dumps(manifest))
    status, out, err = check(capsys, copied)
    assert (status, out) == (2, "")
    assert "manifest.json is damaged" in err


def test_directory_without_sums_is_looked_at_and_says_so(capsys, tmp_path):
    path = write_checkpoint(tmp_path / "source", num_files=2)
    status, out, _ = check(capsys, path)
    assert status == 0
    assert "it has no sums, so changed values cannot be seen" in out


def test_check_without_a_checkpoint_is_refused(capsys):
    assert main(["check"]) == 2
    assert "check needs `checkpoint`" in capsys.readouterr().err


def test_check_that_is_to_write_is_refused(capsys, whole, tmp_path):
    status, _, err = check(capsys, whole, f"output={tmp_path / 'x'}")
    assert status == 2
    assert "`output` has no effect on check" in err


def test_memory_of_a_check_is_bounded_by_its_blocks(whole, monkeypatch):
    """A buffer a piece in hand, of a block at most: what is held does not grow with a tensor."""
    lengths: list[int] = []
    monkeypatch.setattr("parallel.checkpoint.sums._BLOCK_BYTES", 4096)
    monkeypatch.setattr(
        "parallel.checkpoint.sums.bytearray",
        lambda length: (lengths.append(length), bytearray(length))[1],
        raising=False,
    )
    source = PreparedSource(whole)
    check_shards(source, source.ranks, num_threads=2)
    assert max(lengths) == 4096


def test_reshard_and_export_of_a_damaged_directory_are_refused_where_sums_are_asked_for(
    capsys, copied, tmp_path
):
    piece = list_pieces(PreparedSource(copied), [1])[3]
    flip(piece.path, piece.offset)
    for task in ("prepare", "export"):
        words = (f"checkpoint={copied}", f"output={tmp_path / 'out'}", "verify_checksums=true")
        assert main([task, *words]) == 2
        assert f"first {piece.name} of rank 1" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_sums_of_what_has_none_are_refused_before_a_rank_starts(capsys, tmp_path):
    path = write_checkpoint(tmp_path / "source")
    assert main(["generate", f"checkpoint={path}", "prompt=a", "verify_checksums=true"]) == 2
    assert "`verify_checksums` has no effect" in capsys.readouterr().err


def test_ranks_hash_each_shard_once_between_them(whole, monkeypatch):
    """Also where there are fewer or more ranks than shards."""
    hashed: list[tuple[int, ...]] = []
    monkeypatch.setattr(checksums, "check_shards", lambda _, ranks, __: hashed.append(ranks))
    for size in (1, 2, 3):
        hashed.clear()
        for rank in range(size):
            checksums.check_own_shards(
                SimpleNamespace(
                    job=SimpleNamespace(checkpoint=whole),
                    group=SimpleNamespace(rank=rank, size=size),
                    timeline=SimpleNamespace(mark=lambda _: None),
                )
            )
        assert sorted(rank for ranks in hashed for rank in ranks) == [0, 1]


def test_a_rank_refuses_its_damaged_shard_and_no_other(copied):
    source = open_checkpoint(copied).source
    piece = list_pieces(source, [0])[0]
    flip(piece.path, piece.offset)
    check_shards(source, [1], num_threads=1)
    with pytest.raises(CheckpointError, match=r"1 of .* sums"):
        check_shards(source, [0], num_threads=1)


@pytest.mark.parametrize(("asked", "steps"), [(True, ["sums", "task"]), (False, ["task"])])
def test_a_rank_looks_at_its_shard_before_its_task(monkeypatch, asked, steps):
    done: list[str] = []
    monkeypatch.setattr("launcher.tasks.checksums.check_own_shards", lambda _: done.append("sums"))
    monkeypatch.setattr("launcher.tasks.generate.run_rank", lambda _: done.append("task"))
    config = SimpleNamespace(verify_checksums=asked)
    rank_task("generate")(SimpleNamespace(job=SimpleNamespace(config=config)))
    assert done == steps


@pytest.fixture
def mindspore(whole, tmp_path) -> Path:
    """The same model in one .ckpt with MindSpore's own checksum."""
    source = open_checkpoint(whole.parent / "source").path
    folder = tmp_path / "mindspore"
    folder.mkdir()
    for file in source.glob("*.json"):
        shutil.copy(file, folder)
    shutil.copy(source / "tokenizer.model", folder)
    weights = load_file(source / "model.safetensors")
    write_ckpt(folder / "model.ckpt", to_mindformers(weights), crc=True)
    return folder


def test_checksum_of_a_mindspore_file_is_verified(capsys, mindspore, tmp_path):
    status, out, _ = check(capsys, mindspore)
    assert status == 0
    assert "the checksum of every file is right" in out
    flip(mindspore / "model.ckpt", 70_000)
    status, _, err = check(capsys, mindspore)
    assert status == 1
    assert "must have the checksum" in err
    words = [
        "prepare",
        f"checkpoint={mindspore}",
        f"output={tmp_path}/out",
        "verify_checksums=true",
    ]
    assert main(words) == 2
    assert not (tmp_path / "out").exists()


def test_a_mindspore_file_without_checksum_is_said_to_have_none(capsys, mindspore, tmp_path):
    data = (mindspore / "model.ckpt").read_bytes()
    (mindspore / "model.ckpt").write_bytes(data[:-17])
    status, out, _ = check(capsys, mindspore)
    assert status == 0
    assert "it has no sums" in out
    words = ["prepare", f"checkpoint={mindspore}", f"output={tmp_path}/out"]
    assert main([*words, "verify_checksums=true"]) == 2
    assert "has no checksum in model.ckpt" in capsys.readouterr().err
