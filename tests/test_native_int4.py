"""int4 and grouped weights in C: the bits of the reference for every scheme, offset and set."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from quant.activations import row_amax
from quant.kernels import make_ready
from quant.kernels.native import NativeKernel, calls
from quant.kernels.native.int4 import GroupedNativeWeight
from quant.kernels.onednn import OneDnnKernel
from quant.kernels.reference import ReferenceKernel
from quant.linear import linear
from quant.numeric import Grid
from quant.packing import has_product
from quant.weight import QuantizedWeight

SETS = list(calls.instruction_sets()) if calls.is_available() else []
pytestmark = pytest.mark.skipif(not SETS, reason="no C compiler at installation")
GRIDS = [Grid(4), Grid(4, 32), Grid(4, 64), Grid(4, 128), Grid(8, 32), Grid(8, 128)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# (out_features, in_features, first_column): whole blocks, several steps, a column, parts that begin
# and end inside a group, at any column of eight, and within one group.
SHAPES = [
    (64, 256, 0),
    (70, 515, 16),
    (33, 1300, 24),
    (3, 1, 5),
    (33, 201, 0),
    (32, 333, 29),
    (40, 3, 9),
]


def make_weight(grid, shape, activation_dtype=None, scale_dtype=torch.bfloat16):
    out_features, in_features, first_column = shape
    random = torch.Generator().manual_seed(in_features)
    first = first_column if grid.group_size else 0
    values = torch.randint(
        grid.lowest, grid.highest + 1, shape[:2], dtype=torch.int8, generator=random
    )
    num_groups = grid.num_groups(first + in_features)
    scale = (torch.rand(out_features, num_groups, generator=random) * 0.1).clamp(min=1e-5)
    return QuantizedWeight(
        values, scale.to(scale_dtype), activation_dtype, grid.bits, grid.group_size, first
    )


def assert_same_bits(name, weight, num_rows, dtype):
    random = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, weight.shape[1], generator=random).to(dtype)
    bias = torch.randn(weight.shape[0], generator=random).to(dtype)
    exact, packed = ReferenceKernel().pack(weight), NativeKernel(name).pack(weight)
    assert isinstance(packed, GroupedNativeWeight)
    amax = row_amax(x) * 1.5  # as of longer rows that these are parts of
    found, expected = packed.sums(x, amax), exact.sums(x, amax)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    for out_dtype in {dtype, torch.float32}:
        assert torch.equal(packed.linear(x, bias, out_dtype), exact.linear(x, bias, out_dtype))
        assert torch.equal(
            packed.finish(found, amax, bias, dtype, out_dtype),
            exact.finish(expected.clone(), amax, bias, dtype, out_dtype),
        )


@pytest.mark.parametrize("activation_dtype", [None, "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", SETS)
def test_every_scheme_and_offset_gives_the_bits_of_the_reference(
    name, grid, shape, activation_dtype
):
    for dtype in FLOATS:
        weight = make_weight(grid, shape, activation_dtype)
        for num_rows in (1, 3, 7):
            assert_same_bits(name, weight, num_rows, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("grid", [Grid(4), Grid(4, 32), Grid(4, 128), Grid(8, 64)], ids=str)
@pytest.mark.parametrize("name", SETS)
def test_every_number_of_rows_gives_the_bits_of_the_reference(name, grid, dtype):
    """Tiles of every size, widened weights that are kept, and several panels and rounds of rows."""
    weight = make_weight(grid, (70, 200, 40))
    for num_rows in (*range(1, 14), 128, 241):
        assert_same_bits(name, weight, num_rows, dtype)


@pytest.mark.parametrize("scale_dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("name", SETS)
def test_scales_of_every_dtype_are_widened_exactly(name, scale_dtype):
    """float16's subnormal numbers among them."""
    weight = make_weight(Grid(4, 32), (64, 256, 0), scale_dtype=scale_dtype)
    weight.scale_NG[:, 0] = torch.logspace(-7, 4, 64).to(scale_dtype)
    weight.scale_NG[3, 1:] = torch.finfo(torch.float16).smallest_normal / 1024
    assert_same_bits(name, weight, 2, torch.bfloat16)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", SETS)
def test_largest_sums_are_exact(name, grid):
    """-8 (-128) times 127 * 254 in every column of Llama 3.1 405B's FFN: no sum wraps."""
    columns = 53248
    values = torch.full((32, columns), grid.lowest, dtype=torch.int8)
    scale = torch.ones(32, grid.num_groups(columns))
    for dtype, activation_dtype, levels in (
        (torch.bfloat16, None, 127 * 254),
        (torch.bfloat16, "int8", 127),
        (torch.float32, None, 127 * 254**2),
    ):
        weight = QuantizedWeight(values, scale, activation_dtype, grid.bits, grid.group_size)
        x = torch.ones(7, columns, dtype=dtype)
        packed = NativeKernel(name).pack(weight)
        sums = packed.sums(x, row_amax(x))
        if grid.group_size is None:
            assert (sums == grid.lowest * levels * columns).all()
        assert torch.equal(sums[:1], ReferenceKernel().pack(weight).sums(x[:1], row_amax(x[:1])))
        assert (sums == sums[0, 0]).all()


@pytest.mark.parametrize("cuts", [(0, 64, 128, 201), (0, 50, 70, 201), (0, 200, 201)])
def test_parts_of_a_row_are_multiplied_where_ranks_cut_it(cuts):
    weight = make_weight(Grid(4, 32), (33, 201, 0))
    x = torch.randn(3, 201, generator=torch.Generator().manual_seed(0))
    for start, stop in pairwise(cuts):
        part = weight.columns(start, stop)
        ready = make_ready(NativeKernel(), part)
        assert isinstance(ready, GroupedNativeWeight)
        assert torch.equal(linear(x[:, start:stop], ready), linear(x[:, start:stop], part))


def test_rows_and_weights_that_are_no_neighbours_in_memory():
    weight = make_weight(Grid(4, 64), (64, 256, 0))
    turned = QuantizedWeight(
        weight.values_NK.T.contiguous().T, weight.scale_NG, None, weight.bits, weight.group_size
    )
    x = torch.randn(256, 9, generator=torch.Generator().manual_seed(0)).T[::2]
    packed = NativeKernel().pack(turned)
    assert torch.equal(linear(x, packed), linear(x, weight))


def test_packed_weight_holds_nibbles_and_stored_scales_and_no_more():
    for grid, num_bytes in ((Grid(4, 128), 64 * 128 + 2 * 2 * 64), (Grid(4), 64 * 128 + 4 * 64)):
        packed = NativeKernel().pack(make_weight(grid, (64, 256, 0)))
        held = [item for item in vars(packed).values() if isinstance(item, torch.Tensor)]
        stored = {item.untyped_storage().data_ptr(): item.untyped_storage() for item in held}
        assert packed.nbytes == num_bytes
        # Ones that stand for the missing scales of rows are one number.
        assert sum(item.nbytes() for item in stored.values()) <= num_bytes + 4


def test_row_with_a_nan_or_an_infinity_gives_nan_and_spares_the_others():
    x = torch.randn(3, 201)
    x[0, 5], x[2, 7] = torch.nan, torch.inf
    for name in SETS:
        out = linear(x, NativeKernel(name).pack(make_weight(Grid(4, 32), (33, 201, 0))))
        assert out[0].isnan().all()
        assert out[2].isnan().all()
        assert out[1].isfinite().all()


def test_wrong_shapes_are_caught_before_the_c_code():
    packed = NativeKernel().pack(make_weight(Grid(4, 32), (64, 256, 0)))
    with pytest.raises(AssertionError):
        packed.linear(torch.randn(1, 264), None, torch.float32)
    with pytest.raises(AssertionError):
        packed.linear(torch.randn(1, 256), torch.zeros(63), torch.float32)


@pytest.mark.parametrize("grid", [*GRIDS, Grid(8)], ids=str)
def test_c_has_a_product_for_every_scheme_and_onednn_for_one(grid):
    weight = make_weight(grid, (64, 256, 0))
    assert has_product("native", weight.scheme)
    assert has_product("onednn", weight.scheme) == (grid == Grid(8))
    if grid != Grid(8):
        ready = make_ready(OneDnnKernel(), weight)
        assert type(ready) is type(ReferenceKernel().pack(weight))
