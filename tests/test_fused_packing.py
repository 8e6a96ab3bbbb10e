"""Parts of a fused weight, packed straight into their places: the bits of the joined weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from quant.kernels import make_ready
from quant.kernels.native import NativeKernel, calls
from quant.kernels.native.weight import NativeWeight
from quant.kernels.onednn import OneDnnKernel
from quant.kernels.reference import ReferenceKernel
from quant.linear import linear
from quant.numeric import Grid, pack_int4
from quant.weight import NibbleWeight, QuantizedWeight, form_of, fuse, unpacked

needs_c = pytest.mark.skipif(not calls.is_available(), reason="no C compiler at installation")
GRIDS = [Grid(8), Grid(8, 32), Grid(4), Grid(4, 32), Grid(4, 128)]
# Rows of each part: whole blocks; parts that begin inside a block, at a whole register of rows and
# not; parts within one block.
ROWS = [(64, 32), (40, 8, 8), (33, 7, 70), (3, 1, 2)]
# Columns, and the place of the first one in its group: whole registers of every kind with pages that
# are touched at once, a few columns, eights that are cut at their end, and at their beginning.
COLUMNS = [(4096, 0), (24, 0), (201, 0), (72, 20)]


def make_parts(
    grid: Grid, rows: Sequence[int], columns: tuple[int, int], activation_dtype: str | None = None
) -> list[QuantizedWeight]:
    random = torch.Generator().manual_seed(sum(rows))
    first_column = columns[1] if grid.group_size else 0

    def make(num_rows: int) -> QuantizedWeight:
        values = torch.randint(
            grid.lowest, grid.highest + 1, (num_rows, columns[0]), generator=random
        )
        scale = torch.rand(num_rows, grid.num_groups(first_column + columns[0]), generator=random)
        return QuantizedWeight(
            values.to(torch.int8), scale.bfloat16(), activation_dtype, grid.bits, grid.group_size,
            first_column,
        )  # fmt: skip

    return [make(num_rows) for num_rows in rows]


def as_stored(weight: QuantizedWeight) -> NibbleWeight:
    form = replace(weight, values_NK=weight.values_NK.to("meta"))
    return NibbleWeight(pack_int4(weight.values_NK), form)


def held(weight: object) -> dict[str, torch.Tensor]:
    assert isinstance(weight, NativeWeight)
    return {name: item for name, item in vars(weight).items() if isinstance(item, torch.Tensor)}


def assert_same(found: object, expected: object) -> None:
    tensors = held(expected)
    assert "packed" in tensors
    assert held(found).keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(held(found)[name], tensor), name


@needs_c
@pytest.mark.parametrize("columns", COLUMNS, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_parts_are_packed_as_the_joined_weight_is(grid, rows, columns):
    """The portable set takes int8 activations in quads, the widest may take them in pairs."""
    for activation_dtype, name in ((None, None), ("int8", None), ("int8", "portable")):
        parts = make_parts(grid, rows, columns, activation_dtype)
        kernel = NativeKernel(name)
        joined = kernel.pack(fuse(parts))
        ready = make_ready(kernel, *parts)
        assert_same(ready, joined)
        assert (ready.shape, ready.nbytes) == (joined.shape, joined.nbytes)
        if grid.bits == 4:
            assert_same(make_ready(kernel, *map(as_stored, parts)), joined)


@needs_c
@pytest.mark.parametrize("columns", [4096, 24, 201, 72, 3], ids=str)
def test_the_sums_of_the_channels_lie_behind_their_quads(columns):
    (weight,) = make_parts(Grid(8), (45,), (columns, 0), "int8")
    packed = NativeKernel("portable").pack(weight).packed
    sums = packed[:, -1].view(torch.int32).flatten()
    assert sums.tolist() == weight.values_NK.sum(1).tolist() + [0] * (64 - 45)
    words = weight.values_NK.new_zeros(64, packed[:, :-1].shape[1] * 4)
    words[:45, :columns] = weight.values_NK
    assert torch.equal(packed[:, :-1], words.view(2, 32, -1, 4).transpose(1, 2))


@needs_c
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_packed_parts_multiply_as_each_alone_does_in_the_reference(grid):
    parts = make_parts(grid, (33, 7, 70), (200, 0))
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    stored = [as_stored(part) for part in parts] if grid.bits == 4 else parts
    alone = torch.cat([linear(x, part) for part in parts], dim=1)
    assert torch.equal(linear(x, make_ready(NativeKernel(), *stored)), alone)


@needs_c
@pytest.mark.parametrize("first", [0, 3, 8, 29, 32])
@pytest.mark.parametrize(
    ("function", "bits", "width", "num_words"),
    [
        ("pack_pairs", 8, 2, 56),
        ("pack_quads", 8, 4, 29),
        ("pack_int4", 4, 4, 14),
        ("pack_nibbles", 4, 4, 14),
    ],
    ids=str,
)
def test_packing_writes_its_own_channels_and_no_others(function, bits, width, num_words, first):
    num_rows, num_columns = 21, 112
    (weight,) = make_parts(Grid(bits), (num_rows,), (num_columns, 0))
    rows = pack_int4(weight.values_NK) if function == "pack_nibbles" else weight.values_NK
    packed = torch.full((2, num_words, 32, width), 0x55, dtype=torch.uint8)
    before = packed.clone()
    getattr(calls.open_library(), f"shardrun_{function}")(
        rows.data_ptr(), rows.stride(0), num_rows, num_columns, packed.data_ptr(), first
    )
    channels = (packed != before).transpose(1, 2).flatten(0, 1).flatten(1).any(1)
    assert channels.nonzero().flatten().tolist() == list(range(first, first + num_rows))


def test_other_paths_are_given_the_joined_weight():
    parts = make_parts(Grid(4, 32), (33, 7), (72, 20))
    x = torch.randn(2, 72, generator=torch.Generator().manual_seed(0))
    for kernel in (ReferenceKernel(), OneDnnKernel()):
        ready = make_ready(kernel, *map(as_stored, parts))
        assert torch.equal(linear(x, ready), linear(x, fuse(parts)))


def test_stored_nibbles_become_the_weight_they_were():
    (weight,) = make_parts(Grid(4, 32), (5,), (201, 8))
    stored = as_stored(weight).to(torch.device("cpu"))
    assert form_of(stored).scheme == weight.scheme
    found = unpacked(stored)
    assert torch.equal(found.values_NK, weight.values_NK)
    assert (found.first_column, found.shape) == (weight.first_column, weight.shape)


def test_unquantized_parts_are_joined_and_one_alone_is_no_copy():
    parts = [torch.randn(rows, 8) for rows in (3, 1, 2)]
    assert torch.equal(make_ready(ReferenceKernel(), *parts), torch.cat(parts))
    assert make_ready(NativeKernel(), parts[0]) is parts[0]


@needs_c
def test_parts_of_unequal_schemes_are_never_packed_together():
    with pytest.raises(AssertionError, match="one product, one scheme"):
        make_ready(
            NativeKernel(), *(make_parts(Grid(4, size), (32,), (64, 0))[0] for size in (32, 64))
        )
