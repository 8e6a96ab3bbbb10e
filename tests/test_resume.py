"""A prepare that is cut off anywhere is gone on with, and ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from filecmp import cmp
from pathlib import Path

import pytest
import torch

from parallel.checkpoint import conversion, disk
from parallel.checkpoint.open import open_checkpoint
from parallel.checkpoint.plan_disk import prepared_bytes
from parallel.checkpoint.readers.prepared import PreparedSource
from parallel.checkpoint.store import write_prepared
from parallel.checkpoint.unfinished import Unfinished
from parallel.errors import CheckpointError
from parallel.group import ThreadGroup
from quant.scheme import QuantScheme
from tests.checkpoints import write_checkpoint
from tests.models import RTN
from tests.test_prepared import checksums, prepare

GROUPED = QuantScheme(
    quant_method="rtn", weight_dtype="int4", weight_quant_granularity="per_group", group_size=32
)
COPIED_HEAD = QuantScheme(quant_method="rtn", weight_dtype="int8", modules_to_not_convert=())


class Cut(BaseException):
    """Ends a prepare as a kill does: nothing is tidied up after it."""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    return write_checkpoint(path, dtype=torch.bfloat16, num_files=3, tie_word_embeddings=True)


@pytest.fixture
def cut_after(monkeypatch):
    """Lets so many writes pass, and half of the next."""

    def arm(count: int) -> None:
        left = iter(range(count))
        real = conversion.ShardFile.write

        def write(self, name, tensor, first_row=0):
            if next(left, None) is None:
                real(self, name, tensor[: len(tensor) // 2], first_row)
                raise Cut
            return real(self, name, tensor, first_row)

        monkeypatch.setattr(conversion.ShardFile, "write", write)

    return arm


def partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


@pytest.fixture
def cut_off(source, tmp_path, monkeypatch, cut_after):
    """What a prepare has left that was cut off, and the sums of one that was not."""
    with monkeypatch.context():
        cut_after(40)
        prepare_cut_off(source, tmp_path / "kept")
        monkeypatch.undo()
    return partial(tmp_path / "kept"), checksums(prepare(source, tmp_path / "whole", 2))


def prepare_cut_off(source: Path, output: Path, size: int = 2, **how) -> None:
    with pytest.raises(Cut):
        prepare(source, output, size, **how)
    assert not output.exists()
    assert partial(output).is_dir()


@pytest.mark.parametrize("scheme", [RTN, GROUPED, COPIED_HEAD], ids=["w8", "w4g32", "head"])
def test_cut_anywhere_the_next_run_ends_with_the_same_bytes(
    source, tmp_path, monkeypatch, cut_after, scheme
):
    wanted = checksums(prepare(source, tmp_path / "whole", 2, scheme))
    for count in (0, 1, 2, 7, 20, 33, 50):
        output = tmp_path / f"cut{count}"
        with monkeypatch.context():
            cut_after(count)
            prepare_cut_off(source, output, scheme=scheme)
            monkeypatch.undo()
        assert checksums(prepare(source, output, 2, scheme)) == wanted
        assert not partial(output).exists()


def test_killed_for_real_the_next_run_ends_with_the_same_bytes(tmp_path):
    """A few moments here; `python tests/kill_prepare.py 50` tries as many as one likes."""
    script = Path(__file__).parent / "kill_prepare.py"
    command = [sys.executable, str(script), "6", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=script.parents[1]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 ended with the same bytes" in done.stdout


def first_record(edit):
    """The first whole note of a journal, changed by `edit`."""

    def change(lines: list[bytes]) -> list[bytes]:
        at = next(at for at, line in enumerate(lines) if line)
        name, record = json.loads(lines[at])
        edit(record)
        return [*lines[:at], json.dumps([name, record]).encode(), *lines[at + 1 :]]

    return change


def of_first_tensor(record):
    return next(iter(record["slices"].values()))


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines, b"5", b'"ab"', b'[["x"], {}]', b"\xff", b"[" * 100_000],
        first_record(lambda record: record.pop("source")),
        first_record(lambda record: record.update(slices=None)),
        first_record(lambda record: record["slices"].clear()),
        first_record(lambda record: of_first_tensor(record).pop("1")),
        first_record(lambda record: of_first_tensor(record).update({"7": "0" * 64})),
    ],
    ids=["lines", "no source", "null", "no slices", "a rank less", "a rank more"],
)
def test_notes_of_another_form_are_done_again(cut_off, source, tmp_path, change):
    kept, wanted = cut_off
    shutil.copytree(kept, partial(tmp_path / "out"))
    journal = partial(tmp_path / "out") / "journal_0.jsonl"
    journal.write_bytes(b"\n".join(change(journal.read_bytes().split(b"\n"))))
    assert checksums(prepare(source, tmp_path / "out", 2)) == wanted


def test_bytes_behind_an_unfinished_shard_are_cut_off(cut_off, source, tmp_path):
    kept, wanted = cut_off
    shutil.copytree(kept, partial(tmp_path / "out"))
    with (partial(tmp_path / "out") / "whole/rank_0/model.safetensors").open("ab") as file:
        file.write(b"more")
    assert checksums(prepare(source, tmp_path / "out", 2)) == wanted


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]"])
def test_damaged_arguments_name_what_to_remove(cut_off, source, tmp_path, text):
    output = tmp_path / "out"
    shutil.copytree(cut_off[0], partial(output))
    (partial(output) / "arguments.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=f"damaged; remove {partial(output)} to begin anew"):
        prepare(source, output, 2)
    shutil.rmtree(partial(output))
    assert checksums(prepare(source, output, 2)) == cut_off[1]


def test_what_was_done_is_not_read_again(source, tmp_path, monkeypatch, cut_after):
    with monkeypatch.context():
        cut_after(40)
        prepare_cut_off(source, tmp_path / "out")
        monkeypatch.undo()
    checkpoint = open_checkpoint(source)
    read = counting(checkpoint.source)
    write_prepared(checkpoint.layout(RTN), checkpoint.source, 2, tmp_path / "out")
    assert 0 < len(read) < len(checkpoint.source.tensors)


def counting(source) -> dict[str, int]:
    """Rows of each tensor that are read from now on."""
    read: dict[str, int] = {}
    real = source.read

    def count(name, index):
        read[name] = read.get(name, 0) + index[0].stop - index[0].start
        return real(name, index)

    source.read = count
    return read


def test_a_byte_that_changed_meanwhile_is_written_again(source, tmp_path, monkeypatch, cut_after):
    wanted = checksums(prepare(source, tmp_path / "whole", 2))
    with monkeypatch.context():
        cut_after(40)
        prepare_cut_off(source, tmp_path / "out")
        monkeypatch.undo()
    for shard in partial(tmp_path / "out").glob("whole/rank_*/*"):
        data = bytearray(shard.read_bytes())
        data[-2000:] = bytes(2000)
        shard.write_bytes(data)
    assert checksums(prepare(source, tmp_path / "out", 2)) == wanted


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size": 4}, r"parallel.tp \(2, now 4\)"),
        ({"scheme": GROUPED}, "another quant"),
        ({"vocab_emb_dp": True}, "vocab_emb_dp"),
    ],
)
def test_other_arguments_are_refused_by_name(
    source, tmp_path, monkeypatch, cut_after, change, named
):
    with monkeypatch.context():
        cut_after(9)
        prepare_cut_off(source, tmp_path / "out")
        monkeypatch.undo()
    before = checksums(partial(tmp_path / "out"))
    with pytest.raises(CheckpointError, match=named):
        prepare(source, tmp_path / "out", **{"size": 2, **change})
    assert checksums(partial(tmp_path / "out")) == before


def test_a_source_that_changed_is_refused(source, tmp_path, monkeypatch, cut_after):
    own = shutil.copytree(source, tmp_path / "source")
    with monkeypatch.context():
        cut_after(9)
        prepare_cut_off(own, tmp_path / "out")
        monkeypatch.undo()
    os.utime(sorted(own.glob("*.safetensors"))[0])
    with pytest.raises(CheckpointError, match="another checkpoint"):
        prepare(own, tmp_path / "out", 2)


def test_a_shard_of_a_prepared_source_that_changed_is_refused(
    source, tmp_path, monkeypatch, cut_after
):
    own = prepare(source, tmp_path / "source", 4)
    with monkeypatch.context():
        cut_after(9)
        prepare_cut_off(own, tmp_path / "out", scheme=QuantScheme())
        monkeypatch.undo()
    os.utime(own / "rank_3/model.safetensors")
    with pytest.raises(CheckpointError, match="another checkpoint"):
        prepare(own, tmp_path / "out", 2, QuantScheme())


def test_the_second_of_two_prepares_is_refused(source, tmp_path):
    with Unfinished(tmp_path / "out", {}).begun():
        with pytest.raises(CheckpointError, match="written by another prepare"):
            prepare(source, tmp_path / "out", 2)
        (tmp_path / ".out.partial/whole/file").touch()
    assert (tmp_path / "out/file").exists()


def test_a_full_disk_is_foreseen_and_what_is_done_counts(source, tmp_path, monkeypatch, cut_after):
    with monkeypatch.context():
        cut_after(30)
        prepare_cut_off(source, tmp_path / "out")
        monkeypatch.undo()
    layout = open_checkpoint(source).layout(RTN)
    needed = prepared_bytes(layout, 2, source=source)
    monkeypatch.setattr(disk, "free_bytes", lambda _: needed - 1)
    with pytest.raises(CheckpointError, match="GB free"):
        prepare(source, tmp_path / "new", 2)
    assert not partial(tmp_path / "new").exists()
    # The shards that are begun have their room already.
    prepare(source, tmp_path / "out", 2)


def test_a_directory_of_somebody_else_is_left_alone(source, tmp_path):
    partial(tmp_path / "out").mkdir()
    (partial(tmp_path / "out") / "precious").touch()
    with pytest.raises(CheckpointError, match="holds other files"):
        prepare(source, tmp_path / "out", 2)
    assert (partial(tmp_path / "out") / "precious").exists()


def test_what_a_run_left_that_had_named_its_output_is_removed(source, tmp_path):
    prepare(source, tmp_path / "out", 2)
    partial(tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        prepare(source, tmp_path / "out", 2)
    assert not partial(tmp_path / "out").exists()


@pytest.mark.parametrize("block_bytes", [1, 1000, 9999])
@pytest.mark.parametrize("scheme", [QuantScheme(), RTN, GROUPED, COPIED_HEAD], ids=str)
def test_bytes_do_not_depend_on_the_blocks(source, tmp_path, monkeypatch, block_bytes, scheme):
    wanted = checksums(prepare(source, tmp_path / "whole", 4, scheme))
    monkeypatch.setattr(conversion, "BLOCK_BYTES", block_bytes)
    assert checksums(prepare(source, tmp_path / "blocks", 4, scheme)) == wanted
    again = open_checkpoint(tmp_path / "blocks")
    layout = again.layout(QuantScheme())
    write_prepared(layout, again.source, 2, tmp_path / "two")
    assert checksums(tmp_path / "two") == checksums(prepare(source, tmp_path / "2", 2, scheme))


def test_each_row_of_the_source_is_read_once(source, tmp_path):
    checkpoint = open_checkpoint(source)
    read = counting(checkpoint.source)
    write_prepared(checkpoint.layout(COPIED_HEAD), checkpoint.source, 4, tmp_path / "out")
    assert read == {name: info.shape[0] for name, info in checkpoint.source.tensors.items()}


def test_processes_that_share_the_work_write_the_same_bytes(source, tmp_path):
    wanted = checksums(prepare(source, tmp_path / "alone", 4))
    counts = []

    def work(group):
        checkpoint = open_checkpoint(source)
        counts.append(counting(checkpoint.source))
        write_prepared(checkpoint.layout(RTN), checkpoint.source, 4, tmp_path / "out", group=group)

    ThreadGroup.run(3, work)
    assert checksums(tmp_path / "out") == wanted
    names = [name for read in counts for name in read]
    assert len(names) == len(set(names)) == len(open_checkpoint(source).source.tensors)
    assert all(counts)


@pytest.mark.parametrize("scheme", [QuantScheme(), RTN, GROUPED], ids=str)
def test_shards_of_some_ranks_are_those_of_all(source, tmp_path, scheme):
    checkpoint = open_checkpoint(source)
    whole = prepare(source, tmp_path / "all", 4, scheme)
    read = counting(checkpoint.source)
    layout = checkpoint.layout(scheme)
    write_prepared(layout, checkpoint.source, 4, tmp_path / "some", ranks=[3, 1])
    for rank in (1, 3):
        name = f"rank_{rank}/model.safetensors"
        assert cmp(tmp_path / "some" / name, whole / name, shallow=False)
    assert not (tmp_path / "some/rank_0").exists()
    # A column-parallel weight is read where those ranks have rows: half of it.
    assert read["model.layers.0.mlp.up_proj.weight"] <= 64
    found = PreparedSource(tmp_path / "some")
    name = "model.layers.0.mlp.up_proj.weight"
    index = layout.parts[name][0].index(3, 4)
    assert torch.equal(found.read(name, index), PreparedSource(whole).read(name, index))
    with pytest.raises(CheckpointError, match="ranks 3, 1 of 4 only"):
        found.read(name, layout.parts[name][0].index(0, 4))
