"""torch.save files: what torch reads is read, and nothing of a hostile one is run or believed."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parallel.checkpoint.open import open_checkpoint
from parallel.checkpoint.readers.huggingface import HuggingFaceSource
from parallel.checkpoint.readers.pickled.file import TorchFile
from parallel.checkpoint.readers.pickled.machine import read_pickle
from parallel.checkpoint.readers.pickled.names import PickledStorage, PickledTensor
from parallel.errors import CheckpointError
from quant.scheme import QuantScheme
from tests.checkpoints import write_checkpoint
from tests.models import generate, logits
from tests.test_prepared import checksums, prepare

NAME = "model.norm.weight"


def read_all(path: Path) -> dict[str, torch.Tensor]:
    file = TorchFile(path)
    cuts = {
        name: tuple(slice(0, length) for length in info.shape)
        for name, info in file.tensors.items()
    }
    return {name: file.read(name, index) for name, index in cuts.items()}


def refusal(path: Path) -> str:
    """What is said of a file, without its path: pytest puts a test's name into that."""
    with pytest.raises(CheckpointError) as error:
        TorchFile(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message.replace(str(path), "FILE")


def saved(path: Path, value: object, **how) -> Path:
    torch.save(value, path, **how)
    return path


# ------------------------------------------------------------------------------ what torch writes


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 10)
    tied = torch.randn(3, 4)
    return {
        "plain": torch.randn(4, 5),
        "bf16": torch.randn(4, 5).bfloat16(),
        "f16": torch.randn(7).half(),
        "i8": torch.arange(-3, 9, dtype=torch.int8).view(3, 4),
        "u8": torch.arange(9, dtype=torch.uint8),
        "i32": torch.arange(9, dtype=torch.int32),
        "i64": torch.arange(9, dtype=torch.int64),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "tied": tied,
        "tied too": tied,
        "transposed": base.t(),
        "sliced": base[1:5:2, 3:9],
        "three": base.view(2, 3, 10).permute(2, 0, 1),
        "expanded": torch.randn(1, 3).expand(5, 3),
        "windows": torch.arange(9.0).unfold(0, 4, 1),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "nicht-ASCII é 名": torch.ones(1),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_tensor_that_torch_writes_is_read(tmp_path, protocol):
    expected = tensors()
    found = read_all(saved(tmp_path / "a.bin", expected, pickle_protocol=protocol))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].is_contiguous()
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_what_is_read_is_what_torch_loads_safely(tmp_path):
    path = saved(tmp_path / "a.bin", tensors())
    expected, found = torch.load(path, weights_only=True), read_all(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_slice_of_any_strides_is_that_of_torch(tmp_path):
    expected = tensors()
    file = TorchFile(saved(tmp_path / "a.bin", expected))
    numbers = random.Random(1)
    for name, tensor in expected.items():
        for _ in range(20):
            ends = [sorted(numbers.choices(range(n + 1), k=2)) for n in tensor.shape]
            index = tuple(slice(*pair) for pair in ends)
            file.prefetch(name, index)
            assert torch.equal(file.read(name, index), tensor[index]), (name, index)


@pytest.mark.parametrize(
    "wrap", [dict, OrderedDict, lambda d: {"model": d}, lambda d: {"state_dict": d}]
)
def test_state_dict_is_found_alone_or_under_one_known_key(tmp_path, wrap):
    state = {"a": torch.randn(2, 3), "b": torch.randn(2)}
    found = read_all(saved(tmp_path / "a.pt", wrap(state)))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_state_of_a_module_is_read_without_its_versions(tmp_path):
    module = torch.nn.Linear(3, 2)
    module.weight.note = "attributes of a parameter are no weights"
    found = read_all(saved(tmp_path / "a.pt", dict(module.named_parameters())))
    assert torch.equal(found["weight"], module.weight)
    assert read_all(saved(tmp_path / "b.pt", module.state_dict())).keys() == found.keys()


def test_file_is_told_from_one_with_other_values_but_not_by_its_path(tmp_path):
    state = {"a": torch.ones(3)}
    (tmp_path / "b").mkdir()
    same = [saved(folder / "a.bin", state) for folder in (tmp_path, tmp_path / "b")]
    other = saved(tmp_path / "c.bin", {"a": torch.zeros(3)})
    first, second, third = (TorchFile(path).identity() for path in (*same, other))
    assert first == second != third


def imports_torch_to_open(path: Path) -> bool:
    """Also all that is checked before a tensor is read."""
    script = (
        "import sys; from pathlib import Path; from parallel.checkpoint.open import open_checkpoint;"
        "from quant.scheme import QuantScheme;"
        "open_checkpoint(Path(sys.argv[1])).layout(QuantScheme()); print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip() != "False"


def test_opening_needs_no_torch(tmp_path):
    assert not imports_torch_to_open(write_pickled(tmp_path / "bin", 2))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": 3}, "'a' is no tensor but a int"),
        ({"a": None}, "'a' is no tensor"),
        ({"a": torch.ones(1), "b": {"c": torch.ones(1)}}, "'b' is no tensor but a dict"),
        ({"model": {"a": torch.ones(1)}, "epoch": 3}, "'model' is no tensor"),
        ({1: torch.ones(1)}, "'1' is no tensor"),
        ({}, "empty"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "PickledTensor"),
        ({"a": torch.ones(1).double()}, "but has float64"),
        ({"a": torch.ones(1) > 0}, "but has bool"),
        ({"a": torch.ones(1).to(torch.float8_e4m3fn)}, "_rebuild_tensor_v3"),
        ({"a": torch.ones(2, 2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"a": torch.nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear"),
        ({"a": 1 << 100}, "13 bytes"),
        ({("a",): torch.ones(1)}, "key is a tuple"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "ComplexFloatStorage"),
    ],
)
def test_what_is_no_state_dict_of_weights_is_refused_by_name(tmp_path, value, says):
    assert says in refusal(saved(tmp_path / "a.bin", value))


def test_old_format_is_refused_with_the_way_to_convert_it(tmp_path):
    for protocol in (2, 4):
        path = saved(
            tmp_path / "a.bin",
            {"a": torch.ones(1)},
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=False,
        )
        assert "torch.save(torch.load(FILE, weights_only=True), NEW_FILE)" in refusal(path)


# -------------------------------------------------------------------------------- hostile pickles


class Stranger:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "says"),
    [(os.system, "system"), (eval, "eval"), (exec, "exec"), (getattr, "getattr"),
     (__import__, "__import__"), (subprocess.check_output, "check_output"),
     (torch.load, "torch.serialization.load"), (bytearray, "bytearray"), (open, "open")],
)  # fmt: skip
def test_call_in_a_pickle_is_refused_by_name_and_not_made(tmp_path, protocol, function, says):
    target = tmp_path / "was here"
    state = {"a": torch.ones(1), "b": Stranger(function, f"touch '{target}'")}
    message = refusal(saved(tmp_path / "a.bin", state, pickle_protocol=protocol))
    assert says in message
    assert "nothing of it was run" in message
    assert not target.exists()


TEXT = b"\x8c\x01a"
TORCH = b"\x8c\x05torch\x8c\x0cFloatStorage\x93"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(\x8c\x07storage" + TORCH + b"\x8c\x010\x8c\x03cpuK\x04tQ"


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (b"", "1 bytes are asked for"),
        (b"\x80\x00.", "protocol is 0"),
        (b"\x80\x06.", "protocol is 6"),
        (b".", "ends in the middle"),
        (b"NN.", "ends in the middle"),
        (b"(N.", "ends in the middle"),
        (b"t.", "a mark is missing"),
        (b"N(\x85.", "takes more than it gave"),
        (b"\x85.", "takes more than it gave"),
        (b"]\x8cB.", "asked for"),
        (b"X\xff\xff\xff\xffa.", "4,294,967,295 bytes"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffa.", "18,446,744,073,709,551,615 bytes"),
        (b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", "frame"),
        (b"\x8a\xff" + b"\x01" * 300 + b".", "255 bytes"),
        (b"\x8b\x04\x00\x00\x00abcd.", "LONG4"),
        (b"B\x04\x00\x00\x00abcd.", "BINBYTES"),
        (b"I12\n.", "INT"),
        (b"S'a'\n.", "STRING"),
        (b"V a\n.", "UNICODE"),
        (b"ios\nsystem\n.", "INST"),
        (b"(o.", "OBJ"),
        (b"]\x81.", "NEWOBJ"),
        (b"\x82\x01.", "EXT1"),
        (b"P1\n.", "PERSID"),
        (b"\x97.", "NEXT_BUFFER"),
        (b"]0.", "POP"),
        (b"]2.", "DUP"),
        (b"\xff.", "no known name (0xff)"),
        (b"\x8c\x01\xff.", "not UTF-8"),
        (b"h\x05.", "not put aside"),
        (b"j\xff\xff\xff\xff.", "not put aside"),
        (b"cos\nsystem\n.", "'os.system'"),
        (b"cos\n" + b"s" * 300 + b"\n.", "a name has no end"),
        (b"cos", "a name has no end"),
        (b"ccollections\nOrderedDict\n(]tR.", "made from another object"),
        (b"ccollections\nOrderedDict\nN\x85R.", "made from another object"),
        (b"]NR.", "NoneType is where none may be"),
        (b"N)R.", "NoneType is where none may be"),
        (b"})b.", "tuple is where none may be"),
        (b"}}" + TEXT + b"Nsb.", "attributes of its own"),
        (b"]}b.", "attributes of its own"),
        (b"}" + TEXT + b"u.", "a mark is missing"),
        (b"}(" + TEXT + b"u.", "no value"),
        (b"}(" + TEXT + b"N" + TEXT + b"Nu.", "two values are called 'a'"),
        (b"}G\x00\x00\x00\x00\x00\x00\x00\x00Ns.", "key is a float"),
        (b"}\x88Ns.", "key is a bool"),
        (TORCH + b")R.", "where none may be"),
        (b"(\x8c\x07storage" + TORCH + b"\x8c\x010\x8c\x03cpuJ\xff\xff\xff\xfftQ.", "no storage"),
        (b"NQ.", "where none may be"),
        (b")Q.", "no storage"),
        (REBUILD + b")R.", "other arguments"),
        (REBUILD + b"(NK\x00))\x89}tR.", "other arguments"),
        (REBUILD + b"(" + STORAGE + b"J\xff\xff\xff\xff))\x89}tR.", "at least 0"),
        (REBUILD + b"(" + STORAGE + b"K\x00J\xff\xff\xff\xff\x85K\x01\x85\x89}tR.", "at least 0"),
        (REBUILD + b"(" + STORAGE + b"K\x00K\x02\x85J\xff\xff\xff\xff\x85\x89}tR.", "at least 0"),
        (REBUILD + b"(" + STORAGE + b"K\x00\x88\x85K\x01\x85\x89}tR.", "at least 0"),
        (REBUILD + b"(" + STORAGE + b"K\x00K\x01\x85)\x89}tR.", "of 1 dimensions and 0 strides"),
        (REBUILD + b"(" + STORAGE + b"K\x00(" + b"K\x01" * 9 + b"t(" + b"K\x01" * 9 + b"t\x89}tR.",
         "9 dimensions"),
        (REBUILD + b"(" + STORAGE + b"K\x00))\x89}" + TEXT + b"NstR.", "hooks"),
        (REBUILD + b"(" + STORAGE + b"K\x00))\x89}}" + TEXT + b"\x88stR.", "conjugate"),
        (b"ctorch._utils\n_rebuild_parameter\n(N\x89}tR.", "parameter"),
        (b"(" * 200 + b".", "left unfinished"),
        (b"]" * 20_000 + b".", "left unfinished"),
    ],
)  # fmt: skip
def test_damaged_or_hostile_pickle_is_refused(program, says):
    with pytest.raises(CheckpointError, match=r"^[^\n]*$") as error:
        read_pickle(program, Path("a.bin"))
    assert says in str(error.value)


def test_program_of_the_cases_above_is_read_when_it_is_whole():
    program = REBUILD + b"(" + STORAGE + b"K\x00K\x02K\x02\x86K\x02K\x01\x86\x89}tR."
    storage = PickledStorage("0", "float32", 4)
    assert read_pickle(program, Path("a")) == PickledTensor(storage, 0, (2, 2), (2, 1))


def doubled(times: int) -> bytes:
    """A tuple of twice the tuple of twice the tuple …: 2 ** times entries, walked through or hashed."""
    return b")\x94" + b"".join(b"j" + struct.pack("<I", n) + b"\x86\x94" for n in range(times))


@pytest.mark.parametrize("bomb", [doubled(10_000), b")" + b"\x85" * 20_000], ids=["wide", "deep"])
def test_bombs_are_refused_without_being_walked_through(tmp_path, bomb):
    for program, says in [
        (b"}" + TEXT + bomb + b"s.", "'a' is no tensor but a tuple"),
        (b"}" + bomb + b"Ns.", "key is a tuple"),
        (REBUILD + bomb + b"R.", "other arguments"),
        (REBUILD + b"(" + STORAGE + b"K\x00" + bomb + b")\x89}tR.", "dimensions"),
        (bomb + b"Q.", "no storage"),
        (bomb + b".", "holds a tuple"),
    ]:
        assert says in refusal(archive(tmp_path / "a.bin", program))


def test_random_programs_of_known_instructions_end_in_a_value_or_a_refusal():
    numbers = random.Random(2)
    words = [b"(", b"}", b"]", b")", b"t", b"\x85", b"\x86", b"\x87", b"N", b"\x88", b"K\x02",
             b"M\x00\x01", b"J\xff\xff\xff\xff", b"\x8a\x01\x05", TEXT, b"\x94", b"q\x00", b"h\x00",
             b"h\x01", b"R", b"b", b"Q", b"s", b"u", b"a", b"e", b"\x93", TORCH, REBUILD, STORAGE, b".",
             b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_parameter\n"]  # fmt: skip
    ends = {"value": 0, "refusal": 0}
    for _ in range(5000):
        program = b"".join(numbers.choices(words, k=numbers.randint(1, 12))) + b"."
        try:
            read_pickle(program, Path("a"))
            ends["value"] += 1
        except CheckpointError:
            ends["refusal"] += 1
    assert min(ends.values()) > 100


# ------------------------------------------------------------------------------ damaged archives


def archive(path: Path, program: bytes, compression: int = zipfile.ZIP_STORED, **entries) -> Path:
    """As Python's zipfile writes it: of storages at any offset, where torch aligns them to 64."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in {"a/data.pkl": b"\x80\x02" + program, **entries}.items():
            file.writestr(name, data)
    return path


FOUR = {"a/data/0": struct.pack("<4f", 1, 2, 3, 4)}


def one_tensor(offset=0, shape=(2, 2), strides=(2, 1)) -> bytes:
    """A program whose state dict has one tensor in a storage of four numbers."""
    integer = lambda n: b"\x8a\x08" + struct.pack("<q", n)  # noqa: E731
    lengths = [b"(" + b"".join(map(integer, values)) + b"t" for values in (shape, strides)]
    arguments = b"(" + STORAGE + integer(offset) + b"".join(lengths) + b"\x89}t"
    return b"}" + TEXT + REBUILD + arguments + b"Rs."


def test_archive_of_another_writer_is_read_though_nothing_is_aligned(tmp_path):
    path = archive(tmp_path / "a.bin", one_tensor(), **FOUR)
    assert TorchFile(path)._zip.entries["a/data/0"].offset % 4
    assert read_all(path)["a"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"offset": 1}, "beyond its storage"),
        ({"shape": (2, 3)}, "beyond its storage"),
        ({"strides": (3, 1)}, "beyond its storage"),
        ({"shape": (1 << 40, 2)}, "larger than the file"),
        ({"shape": (1 << 40, 2), "strides": (0, 1)}, "larger than the file"),
        ({"shape": (0, 1 << 62)}, "larger than the file"),
        ({"shape": (1, 2), "strides": (1 << 62, 1)}, None),
        ({"offset": 1 << 62}, "beyond its storage"),
        ({"offset": 1 << 62, "shape": (0, 2)}, None),
    ],
)
def test_tensor_stays_inside_its_storage(tmp_path, how, says):
    """A stride that is never taken, or the offset of nothing, does no harm and is not refused."""
    path = archive(tmp_path / "a.bin", one_tensor(**how), **FOUR)
    if says is None:
        assert read_all(path)["a"].shape == how["shape"]
    else:
        assert says in refusal(path)


@pytest.mark.parametrize("data", [None, b"", bytes(15), bytes(17), bytes(32)])
def test_storage_has_the_bytes_that_the_pickle_says(tmp_path, data):
    entries = {} if data is None else {"a/data/0": data}
    assert "its storage '0'" in refusal(archive(tmp_path / "a.bin", one_tensor(), **entries))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"a/byteorder": b"big"}, "little-endian"),
        ({"a/byteorder": bytes(1000)}, "1,000 bytes"),
        ({"b/data.pkl": b"N."}, "2 data.pkl"),
        ({"a/data.pkl": bytes(5 << 20)}, "5,242,880 bytes"),
    ],
)
def test_archive_that_is_not_as_torch_writes_it_is_refused(tmp_path, entries, says):
    path = archive(tmp_path / "a.bin", one_tensor(), **{**FOUR, **entries})
    assert says in refusal(path)


def test_compressed_entry_is_refused(tmp_path):
    path = archive(tmp_path / "a.bin", one_tensor(), zipfile.ZIP_DEFLATED, **FOUR)
    assert "compressed" in refusal(path)


def test_two_entries_of_one_name_are_refused(tmp_path):
    path = archive(tmp_path / "a.bin", one_tensor(), **FOUR)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as file:
        warnings.simplefilter("ignore")
        file.writestr("a/data/0", bytes(16))
    assert "two entries are called 'a/data/0'" in refusal(path)


def test_no_file_of_torch_is_refused(tmp_path):
    for data in (b"", b"PK\5\6", bytes(100), b"PK\5\6" + bytes(18), b"\x80\x02cos\nsystem\n"):
        (tmp_path / "a.bin").write_bytes(data)
        refusal(tmp_path / "a.bin")
    os.mkfifo(tmp_path / "pipe.bin")
    assert "regular file" in refusal(tmp_path / "pipe.bin")


# Offsets of fields in an entry of the directory, and in the end of the archive.
FLAGS, METHOD, PACKED, SIZE, OFFSET = 8, 10, 20, 24, 42
COUNTS, COUNT, DIRECTORY_SIZE, DIRECTORY_OFFSET, COMMENT = 8, 10, 12, 16, 20


def patched(path: Path, at: int, kind: str, value: int) -> Path:
    data = bytearray(path.read_bytes())
    struct.pack_into(kind, data, at, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("field", "kind", "value", "says"),
    [
        (FLAGS, "<H", 1, "encrypted"),
        (METHOD, "<H", 8, "compressed"),
        (SIZE, "<L", 1 << 30, "compressed"),
        (OFFSET, "<L", 1 << 30, "beyond the last"),
        (OFFSET, "<L", 3, "beyond the last"),
        (OFFSET, "<L", 0, "disagree"),
        (OFFSET, "<L", 0xFFFFFFFF, "a zip64 length is missing"),
        (0, "<L", 0, "no list of entries"),
        (28, "<H", 0xFFFF, "no list of entries"),
    ],
)
def test_damaged_directory_is_refused(tmp_path, field, kind, value, says):
    path = archive(tmp_path / "a.bin", one_tensor(), **FOUR)
    assert says in refusal(patched(path, path.read_bytes().rfind(b"PK\1\2") + field, kind, value))


@pytest.mark.parametrize(
    ("field", "kind", "value"),
    [(COUNT, "<H", 7), (COUNTS, "<L", 0x00070007), (DIRECTORY_SIZE, "<L", 1 << 31),
     (DIRECTORY_OFFSET, "<L", 1 << 31), (DIRECTORY_OFFSET, "<L", 0), (COMMENT, "<H", 9)],
)  # fmt: skip
def test_damaged_end_is_refused(tmp_path, field, kind, value):
    path = archive(tmp_path / "a.bin", one_tensor(), **FOUR)
    end = path.read_bytes().rfind(b"PK\5\6")
    assert "whole file of torch.save" in refusal(patched(path, end + field, kind, value))


def test_overlapping_entries_are_refused(tmp_path):
    """Its bytes are those of the next entry's header."""
    path = archive(tmp_path / "a.bin", one_tensor(), **FOUR, **{"a/data/1": b""})
    at = path.read_bytes().find(b"PK\1\2", path.read_bytes().find(b"PK\1\2") + 4)
    patched(path, at + PACKED, "<L", 20)
    assert "overlap" in refusal(patched(path, at + SIZE, "<L", 20))


def test_long_offsets_of_zip64_are_read(tmp_path, monkeypatch):
    """Every length and offset above 99 bytes is written as one above 4 GB is."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 99)
    numbers = torch.randn(40)
    program = one_tensor(shape=(40,), strides=(1,)).replace(b"cpuK\x04", b"cpuK\x28")
    path = archive(tmp_path / "a.bin", program, **{"a/data/0": numbers.numpy().tobytes()})
    assert all(mark in path.read_bytes() for mark in (b"PK\6\6", b"PK\6\7"))
    assert torch.equal(read_all(path)["a"], numbers)
    end_64 = path.read_bytes().rfind(b"PK\6\6")
    assert "its directory" in refusal(patched(path, end_64 + 48, "<Q", 1 << 62))


@pytest.fixture
def small(tmp_path) -> Path:
    state = {"a": torch.randn(2, 3), "b": torch.ones(4).bfloat16(), "c": torch.ones(1).expand(9)}
    return saved(tmp_path / "a.bin", state)


def test_file_cut_off_at_any_byte_is_refused(small):
    for length in reversed(range(small.stat().st_size)):
        os.truncate(small, length)
        refusal(small)


@pytest.mark.parametrize("has_sums", [True, False])
def test_changed_byte_ends_in_a_refusal_or_in_tensors_of_the_file(small, has_sums):
    """torch can leave the sums out, and then the machine alone stands before a changed pickle."""
    if not has_sums:
        torch.serialization.set_crc32_options(False)
        try:
            saved(small, {"a": torch.randn(2, 3), "b": torch.ones(4).bfloat16()})
        finally:
            torch.serialization.set_crc32_options(True)
    shapes = {name: tensor.shape for name, tensor in read_all(small).items()}
    good, numbers, refused = small.read_bytes(), random.Random(3), 0
    if not has_sums:
        tracemalloc.start()
    with small.open("r+b", buffering=0) as file:
        for _ in range(1000):
            at = numbers.randrange(len(good))
            os.pwrite(file.fileno(), bytes([good[at] ^ numbers.randrange(1, 256)]), at)
            try:
                found = {name: tensor.shape for name, tensor in read_all(small).items()}
                assert found == shapes or not has_sums
            except CheckpointError:
                refused += 1
            os.pwrite(file.fileno(), good[at : at + 1], at)
    assert refused > 100
    if not has_sums:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2 << 20


# ----------------------------------------------------------------------- Hugging Face directories

INDEX = "pytorch_model.bin.index.json"


def write_pickled(path: Path, num_files: int = 1, **how) -> Path:
    """What tests.checkpoints writes, as transformers wrote it before safetensors."""
    write_checkpoint(path, **how)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    if num_files == 1:
        saved(path / "pytorch_model.bin", OrderedDict(weights))
        return path
    names = [f"pytorch_model-{n + 1:05}-of-{num_files:05}.bin" for n in range(num_files)]
    weight_map = {name: names[at % num_files] for at, name in enumerate(sorted(weights))}
    for file in names:
        saved(path / file, {n: weights[n] for n in weights if weight_map[n] == file})
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def check_slices(path: Path, expected: Path) -> None:
    """Each rank's slice of each tensor, at every size, is that of another directory."""
    found, plain = open_checkpoint(path), open_checkpoint(expected)
    assert found.source.tensors.keys() == plain.source.tensors.keys()
    for row in found.layout(QuantScheme()).table.values():
        for size in (1, 2, 4):
            for rank in range(size):
                index = row.index(rank, size)
                tensor = found.source.read(row.name, index)
                assert tensor.is_contiguous()
                assert torch.equal(tensor, plain.source.read(row.name, index)), row.name


@pytest.mark.parametrize(("num_files", "dtype"), [(1, "float32"), (3, "bfloat16"), (1, "float16")])
def test_pickled_directory_gives_the_tensors_of_safetensors(tmp_path, num_files, dtype):
    how = {"dtype": getattr(torch, dtype), "seed": 4}
    pickled = write_pickled(tmp_path / "bin", num_files, **how)
    check_slices(pickled, write_checkpoint(tmp_path / "safetensors", **how))


@pytest.mark.parametrize("num_files", [1, 3])
def test_pickled_directory_gives_the_text_of_safetensors(tmp_path, num_files):
    plain = write_checkpoint(tmp_path / "safetensors")
    pickled = write_pickled(tmp_path / "bin", num_files)
    expected = generate(plain, [[1, 5, 9], [1, 7]], 1, new_tokens=8)
    for size in (1, 2, 4):
        assert generate(pickled, [[1, 5, 9], [1, 7]], size, new_tokens=8) == expected


def test_tied_head_that_shares_its_storage_is_read(tmp_path):
    path = write_pickled(tmp_path / "bin", tie_word_embeddings=True)
    weights = torch.load(path / "pytorch_model.bin", weights_only=True)
    saved(
        path / "pytorch_model.bin",
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]},
    )
    plain = write_checkpoint(tmp_path / "plain", tie_word_embeddings=True)
    assert torch.equal(logits(path, [1, 5, 9, 3], 2), logits(plain, [1, 5, 9, 3], 2))


def test_pickled_directory_is_prepared_to_the_shards_of_safetensors(tmp_path):
    plain = prepare(write_checkpoint(tmp_path / "plain"), tmp_path / "a", 2)
    pickled = prepare(write_pickled(tmp_path / "bin", 2), tmp_path / "b", 2)
    found, expected = checksums(pickled), checksums(plain)
    # The manifest says which files it was prepared from.
    assert found.pop("manifest.json") != expected.pop("manifest.json")
    assert found == expected


def test_real_model_from_a_pickled_directory_writes_its_text(shared, tmp_path):
    plain = shared / "checkpoints/stories260K/hf"
    (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    saved(tmp_path / "pytorch_model.bin", load_file(plain / "model.safetensors"))
    expected = generate(plain, [[1]], 1, new_tokens=12)
    assert generate(tmp_path, [[1]], 2, new_tokens=12) == expected


def test_integers_of_a_pickled_shard_are_given_as_numbers(tmp_path):
    saved(tmp_path / "pytorch_model.bin", {"shape": torch.tensor([[3, 4]]), "one": torch.tensor(7)})
    assert HuggingFaceSource(tmp_path).numbers(["one", "shape"]) == {"one": 7, "shape": [[3, 4]]}


def test_safetensors_are_preferred_to_pickles_beside_them(tmp_path):
    path = write_pickled(tmp_path / "both")
    write_checkpoint(path)
    (path / "pytorch_model.bin").write_bytes(b"not read")
    assert open_checkpoint(path).source.tensors[NAME].file == "model.safetensors"


def test_link_to_a_file_is_followed_as_the_hub_cache_needs(tmp_path):
    path = write_pickled(tmp_path / "bin", 2)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in list(path.glob("*.bin")):
        file.rename(blobs / file.stem)
        file.symlink_to(Path("..") / "blobs" / file.stem)
    check_slices(path, write_checkpoint(tmp_path / "plain"))


@pytest.mark.parametrize(
    "file", ["../x.bin", "/etc/passwd", "..", ".", "", "a/b.bin", 3, None, ["a.bin"]]
)
def test_index_that_points_elsewhere_is_refused(tmp_path, file):
    path = write_pickled(tmp_path / "bin", 2)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"][NAME] = file
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file name in its own directory"):
        HuggingFaceSource(path)


def link_to(target: str):
    def damage(path: Path) -> None:
        (path / "pytorch_model-00001-of-00002.bin").unlink()
        (path / "pytorch_model-00001-of-00002.bin").symlink_to(target)

    return damage


def edited_index(edit):
    def damage(path: Path) -> None:
        index = json.loads((path / INDEX).read_text())
        edit(index["weight_map"])
        (path / INDEX).write_text(json.dumps(index))

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (link_to("nowhere"), "is missing"),
        (link_to("/dev/zero"), "regular file"),
        (link_to("."), "regular file"),
        (edited_index(lambda found: found.update(more="pytorch_model-00001-of-00002.bin")), "more"),
        (edited_index(lambda found: found.update(more="pytorch_model-3.bin")), "is missing"),
        (lambda path: (path / INDEX).unlink(), f"no {INDEX}"),
    ],
)
def test_index_and_shards_that_do_not_belong_together_are_refused(tmp_path, damage, says):
    path = write_pickled(tmp_path / "bin", 2)
    damage(path)
    with pytest.raises(CheckpointError, match=says):
        HuggingFaceSource(path)


def test_tensor_in_two_shards_is_refused(tmp_path):
    path = write_pickled(tmp_path / "bin", 2)
    for file in path.glob("*.bin"):
        weights = torch.load(file, weights_only=True)
        saved(file, {**weights, NAME: torch.ones(64)})
    with pytest.raises(CheckpointError, match=f"{NAME} is in .*00001.* and in .*00002"):
        HuggingFaceSource(path)
