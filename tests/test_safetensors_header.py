"""Headers of safetensors files: what the format allows is read as the library reads it, and no more."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from parallel.checkpoint.readers.safetensors_file import SafetensorsFile
from parallel.checkpoint.source import DTYPE_NAMES
from parallel.errors import CheckpointError

CODES = {name: code for code, name in DTYPE_NAMES.items()}


def entry(dtype="U8", shape=(16,), offsets=(0, 16), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def write(path: Path, header: object, num_bytes: int = 16) -> Path:
    """A file of this header, which is JSON's value or the very bytes, and that much data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(num_bytes)))
    return path


def read_all(path: Path) -> dict[str, torch.Tensor]:
    file = SafetensorsFile(path)
    return {
        name: file.read(name, tuple(slice(0, length) for length in info.shape))
        for name, info in file.tensors.items()
    }


@pytest.fixture
def small(tmp_path) -> Path:
    """Every dtype that is read, a scalar, a tensor of nothing, metadata."""
    tensors = {
        name: torch.arange(6).reshape(2, 3).to(getattr(torch, name))
        for name in DTYPE_NAMES.values()
    }
    path = tmp_path / "small.safetensors"
    more = {"scalar": torch.tensor(2.5), "nothing": torch.empty(0, 4)}
    save_file({**tensors, **more}, path, metadata={"format": "pt", "rank": "0"})
    return path


def test_file_of_the_library_is_read_as_by_the_library(small):
    expected, found = load_file(small), read_all(small)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert SafetensorsFile(small).metadata == {"format": "pt", "rank": "0"}


def test_integers_are_read_without_torch(tmp_path):
    save_file(
        {"a": torch.tensor([3, -4]), "b": torch.tensor([7], dtype=torch.int32)}, tmp_path / "f"
    )
    assert SafetensorsFile(tmp_path / "f").numbers(["a", "b"]) == {"a": [3, -4], "b": [7]}


@pytest.mark.parametrize("tensor", [torch.ones(2), torch.ones(9).int(), torch.ones(2, 2).int()])
def test_what_is_no_few_integers_is_refused_as_such(tmp_path, tensor):
    save_file({"a": tensor}, tmp_path / "f")
    with pytest.raises(CheckpointError, match="a must be at most 8 integers"):
        SafetensorsFile(tmp_path / "f").numbers(["a"])


TWICE = b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2)
BAD_HEADERS = {
    "empty": b"",
    "no JSON": b"hello",
    "no UTF-8": b'{"\xff": 1}',
    "UTF-16": json.dumps({"a": entry()}).encode("utf-16-le"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps({"a": entry()}).encode(),
    "list": [entry()],
    "number": 3,
    "nested without end": b'{"a":' + b"[" * 200_000,
    "nested objects without end": b'{"a":' * 200_000,
    "words behind": json.dumps({"a": entry()}).encode() + b" x",
    "name twice": TWICE,
    "name twice, once escaped": TWICE.replace(b'"a"', b'"\\u0061"', 1),
    "name twice, the first of them wild": b'{"a": {"dtype": "U8", "shape": [9], "data_offsets": '
    b'[9, 999999]}, "a": %s}' % json.dumps(entry()).encode(),
    "offsets twice": b'{"a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 999999], '
    b'"data_offsets": [0, 16]}}',
    "half a character": b'{"\\ud800": %s}' % json.dumps(entry()).encode(),
    "NaN": b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 16]}}',
    "integer of 5000 digits": b'{"a": {"dtype": "U8", "shape": [%s], "data_offsets": [0, 16]}}'
    % (b"9" * 5000),
    "entry as a list": {"a": ["U8", [16], [0, 16]]},
    "entry of null": {"a": None},
    "entry without shape": {"a": {"dtype": "U8", "data_offsets": [0, 16]}},
    "entry with more": {"a": entry(file="other")},
    "dtype of no text": {"a": entry(dtype=["U8"])},
    "unknown dtype": {"a": entry(dtype="F8_E4M3")},
    "bits": {"a": entry(dtype="F4", shape=(32,))},
    "shape as text": {"a": entry(shape="16")},
    "shape with a fraction": {"a": entry(shape=(16.0,))},
    "shape with a truth": {"a": entry(shape=(True, 16))},
    "negative shape": {"a": entry(shape=(-4, -4))},
    "shape whose product overflows": {"a": entry(shape=(2**62, 2**62, 16))},
    "shape whose product wraps to its bytes": {"a": entry(shape=(2**61 + 2, 8))},
    "offsets with a fraction": {"a": entry(offsets=(0.0, 16.0))},
    "offsets with a truth": {"a": entry(offsets=(False, 16))},
    "offsets as text": {"a": entry(offsets=("0", "16"))},
    "negative offsets": {"a": entry(offsets=(-16, 0))},
    "offsets backwards": {"a": entry(offsets=(16, 0))},
    "one offset": {"a": entry(offsets=(16,))},
    "three offsets": {"a": entry(offsets=(0, 8, 16))},
    "beyond the end": {"a": entry(shape=(32,), offsets=(0, 32))},
    "far beyond the end": {"a": entry(offsets=(2**63, 2**63 + 16))},
    "less than the file": {"a": entry(shape=(8,), offsets=(0, 8))},
    "overlap": {"a": entry(shape=(12,), offsets=(0, 12)), "b": entry(shape=(8,), offsets=(8, 16))},
    "the same bytes": {"a": entry(), "b": entry()},
    "hole": {"a": entry(shape=(8,), offsets=(0, 8)), "b": entry(shape=(7,), offsets=(9, 16))},
    "hole at the start": {"a": entry(shape=(12,), offsets=(4, 16))},
    "nothing inside another": {"a": entry(), "e": entry(shape=(0,), offsets=(3, 3))},
    "half as many bytes": {"a": entry(dtype="F32", shape=(8,))},
    "no tensors": {},
    "tensor called metadata": {"__metadata__": entry()},
    "metadata of numbers": {"__metadata__": {"rank": 0}, "a": entry()},
    "metadata of a list": {"__metadata__": ["format", "pt"], "a": entry()},
}


@pytest.mark.parametrize("fact", BAD_HEADERS, ids=lambda fact: fact.replace(" ", "_"))
def test_bad_header_is_refused_in_a_sentence(tmp_path, fact):
    path = write(tmp_path / "bad.safetensors", BAD_HEADERS[fact])
    with pytest.raises(CheckpointError) as refused:
        SafetensorsFile(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("length", [17, 2**31, 2**32 + 2, 2**62, 2**63, 2**64 - 1])
def test_length_beyond_the_file_allocates_nothing(tmp_path, length):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(14))
    with pytest.raises(CheckpointError, match="its header has"):
        SafetensorsFile(path)


def test_header_of_a_hundred_megabytes_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", 100 << 20) + b"{" + b" " * 100)
    os.truncate(path, (100 << 20) + 8)  # a sparse file: the disk holds none of it
    monkeypatch.setattr("json.loads", lambda *_, **__: pytest.fail("the header was parsed"))
    with pytest.raises(CheckpointError, match="at most"):
        SafetensorsFile(path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink(path, path)])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, make):
    make(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError):
        SafetensorsFile(tmp_path / "model.safetensors")


def test_file_cut_off_at_any_byte_is_refused(small):
    data = small.read_bytes()
    for length in range(len(data)):
        os.truncate(small, length)
        with pytest.raises(CheckpointError):
            SafetensorsFile(small)
        small.write_bytes(data)


def library_reads(path: Path) -> dict | None:
    """What the library makes of a file: each tensor's dtype, shape and bytes; None: it refuses."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, AttributeError, RuntimeError):
        return None


def test_thousands_of_changed_bytes_are_refused_or_read_as_the_library_reads_them(small):
    """Never another exception, and never other tensors than the library's."""
    rng = random.Random(0)
    data = small.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    num_read = 0
    for _ in range(2000):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            # Digits and quotes find the way past the JSON more often than any byte.
            at = rng.randrange(length)
            damaged[at] = rng.choice((rng.randrange(256), *b'0123456789"[]{},:'))
        small.write_bytes(damaged)
        try:
            found = read_all(small)
        except CheckpointError:
            continue
        expected = library_reads(small)
        assert expected is not None
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            # Bytes, as a changed dtype gives floats that are no numbers.
            assert bytes_of(found[name]) == bytes_of(tensor)
        num_read += 1
    assert num_read > 20  # names and metadata may change


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_names_that_json_escapes_are_the_names(tmp_path):
    path = write(tmp_path / "f.safetensors", {'é "\n\\ ☃': entry()})
    assert read_all(path).keys() == {'é "\n\\ ☃'}
