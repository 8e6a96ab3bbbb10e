"""MindSpore's `.ckpt`: every slice of every tensor, and nothing but sentences for damaged files."""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import tracemalloc
from pathlib import Path

import pytest
import torch

from parallel.checkpoint.layout_checks import check_names
from parallel.checkpoint.readers.mindspore.file import MindSporeFile
from parallel.checkpoint.readers.mindspore.protobuf_fields import FieldError
from parallel.checkpoint.readers.mindspore.records import scan_records
from parallel.errors import CheckpointError
from tests.mindspore_checkpoints import (
    TYPE_NAMES,
    ckpt_bytes,
    field,
    number,
    record,
    spread,
    trailer,
    varint,
    write_ckpt,
)

TENSORS = {
    "model.tok_embeddings.embedding_weight": spread((7, 6), torch.float32),
    "conv.weight": spread((4, 3, 2), torch.float16),
    "model.norm_out.weight": spread((5,), torch.bfloat16),
    "step": torch.tensor(7, dtype=torch.int32),
    "scale": spread((6, 1), torch.float64),
    "values": spread((3, 10), torch.int8),
}


def whole(file: MindSporeFile, name: str) -> torch.Tensor:
    return file.read(name, tuple(slice(0, length) for length in file.tensors[name].shape))


def cuts(shape: tuple[int, ...]):
    """Every slice of a small tensor."""
    axes = [
        [slice(a, b) for a in range(length + 1) for b in range(a, length + 1)] for length in shape
    ]
    return itertools.product(*axes)


@pytest.mark.parametrize("slice_bytes", [1 << 29, 48, 24, 7, 1])
@pytest.mark.parametrize("crc", [False, True])
def test_every_slice_is_read_whatever_the_chunks(tmp_path, slice_bytes, crc):
    """Chunks end between rows, inside a row, and inside an entry."""
    file = MindSporeFile(write_ckpt(tmp_path / "a.ckpt", TENSORS, slice_bytes=slice_bytes, crc=crc))
    assert file.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        info = file.tensors[name]
        assert (info.shape, info.dtype) == (tuple(tensor.shape), str(tensor.dtype)[6:])
        for index in cuts(info.shape) if tensor.numel() < 43 and slice_bytes > 1 else [...]:
            index = tuple(slice(0, n) for n in info.shape) if index is ... else index
            found = file.read(name, index)
            assert torch.equal(found, tensor[index])
            assert found.dtype == tensor.dtype
            assert found.is_contiguous()
            assert found.data_ptr() % tensor.element_size() == 0
    assert file.check_sum() is crc


@pytest.mark.parametrize("dtype", TYPE_NAMES)
def test_every_dtype_is_read(tmp_path, dtype):
    tensor = spread((3, 4), dtype)
    assert torch.equal(
        whole(MindSporeFile(write_ckpt(tmp_path / "a.ckpt", {"x": tensor})), "x"), tensor
    )


def test_rows_that_are_aligned_are_a_view_of_the_file(tmp_path):
    """The file is mapped: pages that nobody reads are not touched."""
    path = tmp_path / "a.ckpt"
    names = ["x" * n for n in range(1, 9)]
    write_ckpt(path, {name: spread((64, 64), torch.float32) for name in names})
    file = MindSporeFile(path)
    mapped = file._mapped._mapped()
    begin = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
    inside = [
        begin <= file.read(name, (slice(1, 3), slice(0, 64))).data_ptr() < begin + len(mapped)
        for name in names
    ]
    assert any(inside)
    for name in names:
        assert torch.equal(whole(file, name), spread((64, 64), torch.float32))
        file.prefetch(name, (slice(1, 3), slice(0, 64)))


@pytest.mark.parametrize("dims", [[], [0]])
def test_scalar_stands_with_either_shape(tmp_path, dims):
    path = tmp_path / "a.ckpt"
    path.write_bytes(record("epoch", dims, "Int32", (7).to_bytes(4, "little")))
    assert torch.equal(whole(MindSporeFile(path), "epoch"), torch.tensor(7, dtype=torch.int32))


def test_shape_may_be_packed_and_a_cached_parameter_has_a_suffix(tmp_path):
    path = tmp_path / "a.ckpt"
    content = spread((2, 3), torch.float16)
    raw = content.numpy().tobytes()
    path.write_bytes(record("w.__param_key__3", [2, 3], "Float16", raw, packed=True))
    assert torch.equal(whole(MindSporeFile(path), "w"), content)


def test_tensor_without_entries_may_have_no_content(tmp_path):
    path = tmp_path / "a.ckpt"
    tensor = field(2, number(1, 0) + number(1, 4) + field(2, b"Float32"))
    path.write_bytes(field(1, field(1, b"w") + tensor) + record("v", [0, 3], "Int8", b""))
    file = MindSporeFile(path)
    assert whole(file, "w").shape == (0, 4)
    assert whole(file, "v").shape == (0, 3)


def test_int4_is_read_as_bytes_of_two_values(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(record("w", [1, 2], "Int4", b"\x21\xf3") + record("v", [2], "UInt8", b"12"))
    file = MindSporeFile(path)
    assert torch.equal(whole(file, "w"), torch.tensor([[0x21, 0xF3]], dtype=torch.uint8))
    assert file.int4 == {"w"}


def test_real_files_are_read(shared):
    shapes = {}
    for path in sorted((shared / "mindspore_ckpt").glob("*.ckpt")):
        file = MindSporeFile(path)
        for name in file.tensors:
            values = whole(file, name).double()
            assert values.isfinite().all()
            assert values.abs().max() < 2e6
        shapes[path.name] = {name: info.shape for name, info in file.tensors.items()}
        assert not file.check_sum()
    linears = shapes["test_linears_woq_predict_2stage_fp32.ckpt"]
    assert linears == {
        "linear1.weight": (6, 5), "linear1.bias": (6,), "linear2.weight": (5, 6), "linear2.bias": (5,),
    }  # fmt: skip
    lenet = shapes["serving_lenet_acc98.ckpt"]
    assert lenet["conv1.weight"] == (6, 1, 5, 5)
    assert lenet["scale_sense"] == ()


BAD_RECORDS = {
    "of type random_op": record("random_op", [0], "random_op", b"1234"),
    "a string": record("net", [0], "str", "lenet".encode("utf-32-le")),
    "unknown dtype": record("w", [2], "Float8", b"12"),
    "content too short": record("w", [3], "Int8", b"12"),
    "content too long": record("w", [1], "Int8", b"12"),
    "huge dim": record("w", [1 << 47, 1 << 47], "Float32", b"12345678"),
    "negative dim": record("w", [(1 << 64) - 1], "Int8", b"1"),
    "too many dims": record("w", [1] * 9, "Int8", b"1"),
    "packed dims without end": record("w", [1] * 500, "Int8", b"1", packed=True),
    "no name": record("", [1], "Int8", b"1"),
    "name without end": record("w" * 5000, [1], "Int8", b"1"),
    "name of two lines": record("w\nx", [1], "Int8", b"1"),
    "name that is no text": field(1, field(1, b"\xff\xfe") + field(2, b"")),
    "MapTensor": field(1, field(1, b"w") + field(3, b"")),
    "no tensor": field(1, field(1, b"w")),
    "no dtype": field(1, field(1, b"w") + field(2, number(1, 1) + field(3, b"1"))),
    "two contents": field(
        1, field(1, b"w") + field(2, field(2, b"Int8") + field(3, b"") + field(3, b""))
    ),
    "a field of no record": field(1, field(1, b"w") + field(2, b"") + field(9, b"")),
    "a number for a record": number(1, 5),
    "a record of another kind": field(7, b"1"),
    "twice": record("w", [1], "Int8", b"1") + record("v", [1], "Int8", b"1")
    + record("w", [1], "Int8", b"1"),
    "chunks apart": record("w", [2], "Int8", b"1") + record("v", [1], "Int8", b"1")
    + record("w", [2], "Int8", b"1"),
    "twice in a row": record("w", [1], "Int8", b"1") * 2,
    "chunks of two shapes": record("w", [2], "Int8", b"1") + record("w", [1, 2], "Int8", b"1"),
    "huge length": b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + b"\x00" * 40,
    "number without end": b"\x0a" + b"\xff" * 40,
    "nothing": b"",
    "a pickle": b"PK\x03\x04" + b"\x00" * 40,
    "encrypted": bytes.fromhex("d85e3a7f") + b"\x00" * 40,
}  # fmt: skip


@pytest.mark.parametrize("data", BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_file_that_is_not_read_is_refused_in_a_sentence(tmp_path, data):
    path = tmp_path / "bad.ckpt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        MindSporeFile(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))


def outcome(data: bytes) -> str:
    """What becomes of a file: refused when it is opened, or by the model's names and shapes; or read."""
    try:
        tensors = scan_records(io.BytesIO(data), len(data)).tensors
        check_names(set(TENSORS), tensors, "it")
    except (FieldError, CheckpointError):
        return "refused"
    found = {name: (item.shape, item.dtype) for name, item in tensors.items()}
    wanted = {name: (tuple(at.shape), str(at.dtype)[6:]) for name, at in TENSORS.items()}
    return "read" if found == wanted else "refused"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            b"PK\x03\x04" + bytes(30),
            "is a file of torch.save; name it pytorch_model.bin if it holds",
        ),
        (b"\x80\x02}q\x00.", "is a pickle; name it pytorch_model.bin if it holds"),
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file of llama.cpp; give the checkpoint"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file; give the checkpoint in safetensors."),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a pointer of Git LFS; fetch the file",
        ),
        (b"<!DOCTYPE html>", "is a web page or XML; download the file again."),
    ],
)
def test_another_kind_of_file_is_named(tmp_path, data, sentence):
    path = tmp_path / "model.ckpt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        MindSporeFile(path)
    assert f"{path} must be a MindSpore checkpoint, but {sentence}" in str(caught.value)


@pytest.mark.parametrize("slice_bytes", [1 << 29, 20])
def test_file_cut_anywhere_is_refused(slice_bytes):
    """Between two records by the model's names, elsewhere when it is opened; no exception but ours."""
    data = ckpt_bytes(TENSORS, slice_bytes)
    assert outcome(data) == "read"
    for length in range(len(data)):
        assert outcome(data[:length]) == "refused", length


def test_checksum_cut_anywhere_is_refused_or_gone():
    data = ckpt_bytes(TENSORS)
    ended = data + trailer(data)
    for length in range(len(data) + 1, len(ended)):
        assert outcome(ended[:length]) == "refused", length
    assert outcome(ended) == "read"


def test_changed_bytes_change_a_tensor_at_most(tmp_path):
    """Every bit of what stands between the contents, and one to three random bytes of the file."""
    data = ckpt_bytes(TENSORS, 100)
    contents = content_bytes(tmp_path / "a.ckpt", data)
    draw = random.Random(0)
    changes = [[(at, 1 << bit)] for at in set(range(len(data))) - contents for bit in range(8)]
    changes += [
        [(draw.randrange(len(data)), draw.randrange(1, 256)) for _ in range(draw.randint(1, 3))]
        for _ in range(3000)
    ]
    for change in changes:
        changed = flipped(data, change)
        is_harmless = changed == data or contents.issuperset(at for at, _ in change)
        assert outcome(changed) == ("read" if is_harmless else "refused"), change


def test_damaged_file_takes_no_memory(tmp_path):
    """Whatever number stands where a length should."""
    path, data = tmp_path / "changed.ckpt", ckpt_bytes(TENSORS)
    draw = random.Random(1)
    peak = 0
    for _ in range(200):
        path.write_bytes(flipped(data, [(draw.randrange(80), 0x80), (draw.randrange(80), 0x7F)]))
        tracemalloc.start()
        with contextlib.suppress(CheckpointError):
            MindSporeFile(path)
        peak = max(peak, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The buffer of an open file has up to 128 KiB (Python 3.14); the file itself 600 bytes.
    assert peak < 160 << 10


def flipped(data: bytes, change: list[tuple[int, int]]) -> bytes:
    changed = bytearray(data)
    for at, mask in change:
        changed[at] ^= mask
    return bytes(changed)


def content_bytes(path: Path, data: bytes) -> set[int]:
    """Where the tensors' own bytes lie."""
    path.write_bytes(data)
    stored = MindSporeFile(path)._stored.values()
    chunks = [chunk for item in stored for chunk in item.chunks]
    return {at for part in chunks for at in range(part.offset, part.offset + part.num_bytes)}


def test_checksum_finds_what_nothing_else_does(tmp_path):
    data = bytearray(ckpt_bytes(TENSORS))
    ended = data + trailer(bytes(data))
    for at in range(len(ended)):
        changed = bytearray(ended)
        changed[at] ^= 1
        path = tmp_path / "changed.ckpt"
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"checksum|no whole|must begin"):  # noqa: PT012
            assert MindSporeFile(path).check_sum() is True
            pytest.fail(f"byte {at}")


def test_identity_tells_shapes_and_the_checksum(tmp_path):
    first = write_ckpt(tmp_path / "a.ckpt", {"w": spread((2, 6), torch.int8)}, crc=True)
    second = write_ckpt(tmp_path / "b.ckpt", {"w": spread((6, 2), torch.int8)}, crc=True)
    third = write_ckpt(tmp_path / "c.ckpt", {"w": -spread((2, 6), torch.int8)}, crc=True)
    identities = [MindSporeFile(path).identity() for path in (first, second, third)]
    assert identities[0] != identities[1]
    assert identities[0] != identities[2]
    assert identities[0]["header_sha256"] == identities[2]["header_sha256"]
    copied = tmp_path / "copies"
    copied.mkdir()
    (copied / "a.ckpt").write_bytes(first.read_bytes())
    assert MindSporeFile(copied / "a.ckpt").identity() == identities[0]


def test_contents_are_not_read_to_find_the_tensors(tmp_path):
    """A tensor of 3 TB, sparse: only its records are looked at."""
    path, length = tmp_path / "large.ckpt", 3 << 40
    with path.open("wb") as file:
        # The lengths of the record and of the message around the content hold the content too.
        tensor = number(1, length) + field(2, b"Int8") + b"\x1a" + varint(length)
        value = field(1, b"w") + b"\x12" + varint(len(tensor) + length) + tensor
        file.write(b"\x0a" + varint(len(value) + length) + value)
        file.truncate(file.tell() + length)
    found = MindSporeFile(path)
    assert found.tensors["w"].shape == (length,)
    assert not found.read("w", (slice(length - 3, length),)).any()
