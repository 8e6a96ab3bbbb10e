"""4-bit weights and grouped scales: the arithmetic and the product."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from quant.activations import num_levels, quantize_rows, row_amax
from quant.kernels import reference
from quant.kernels.reference import ReferenceKernel
from quant.linear import linear
from quant.methods.rtn import round_to_nearest
from quant.numeric import Grid, dequantize, pack_int4, unpack_int4
from quant.rounding import quantize, weight_scale
from quant.scheme import LinearScheme
from quant.weight import QuantizedWeight, fuse

GRIDS = [Grid(4), Grid(4, 32), Grid(4, 64), Grid(4, 128), Grid(8, 32), Grid(8)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(rows=33, columns=201, dtype=torch.float32, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_weight(grid, rows=33, columns=201, activation_dtype=None, seed=1):
    values, scale = quantize(random_weight(rows, columns, seed=seed), grid)
    return QuantizedWeight(values, scale, activation_dtype, grid.bits, grid.group_size)


# ---------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_each_group_is_quantized_as_if_it_were_a_row(grid, dtype):
    """Group by group with the formula, in float64, from the stored scale."""
    weight = random_weight(dtype=dtype)
    values, scale = quantize(weight, grid)
    size = grid.group_size or weight.shape[1]
    assert scale.shape == (33, -(-201 // size))
    assert scale.dtype == dtype
    for group, part in enumerate(weight.split(size, 1)):  # the last one is short
        amax = part.abs().amax(1).float()
        expected = (2 * amax.double() / grid.steps).float().to(dtype)
        assert torch.equal(scale[:, group], expected)
        quotient = part.double() / expected[:, None].double()
        found = values[:, group * size : group * size + part.shape[1]].double()
        # Ties that float32 and float64 round apart: the largest value stands at 7.5 or 127.5.
        is_clear = ((quotient - quotient.floor()) - 0.5).abs() > 1e-3
        limited = quotient.round().clamp(grid.lowest, grid.highest)
        assert is_clear.float().mean() > 0.85  # one of 9 in the short group
        assert torch.equal(found[is_clear], limited[is_clear])
    assert values.min() >= grid.lowest
    assert values.max() <= grid.highest
    assert torch.equal(weight_scale(weight, grid, dtype), scale)


def test_grid_of_int4_is_that_of_golden_stick():
    values, scale = quantize(torch.tensor([[7.5, -7.5, 1.0, 0.4]]), Grid(4))
    assert scale.item() == 1
    assert values.tolist() == [[7, -8, 1, 0]]


def test_given_scales_are_used_and_kept():
    weight = random_weight()
    scale = weight_scale(weight, Grid(4, 64), torch.float32) * 0.8
    values, kept = quantize(weight, Grid(4, 64), scale_NG=scale)
    assert kept is scale
    again = dequantize(values, scale, torch.float32, 64)
    expected = (weight / scale.repeat_interleave(64, 1)[:, :201]).round().clamp(-8, 7)
    assert torch.equal(values, expected.to(torch.int8))
    assert torch.equal(again, expected * scale.repeat_interleave(64, 1)[:, :201])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("given", [True, False])
def test_non_finite_group_is_refused(bad, given):
    weight = random_weight()
    scale = weight_scale(weight, Grid(4, 32), torch.float32) if given else None
    weight[5, 200] = bad
    with pytest.raises(ValueError, match="infinity or a NaN"):
        quantize(weight, Grid(4, 32), scale_NG=scale)


def test_zero_group_gives_zeros_and_spares_its_neighbours():
    weight = random_weight(4, 128)
    weight[1, 32:64] = 0
    values, scale = quantize(weight, Grid(4, 32))
    assert scale[1].tolist()[1] == 1
    assert not values[1, 32:64].any()
    assert values[1, :32].any()


def test_blocks_of_rows_change_no_group(monkeypatch):
    weight = random_weight(100, 70)
    whole = quantize(weight, Grid(4, 32))
    monkeypatch.setattr("quant.rounding.BLOCK_BYTES", 7 * 70 * 4)
    for one, other in zip(whole, quantize(weight, Grid(4, 32)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("columns", [1, 2, 7, 64])
def test_nibbles_come_back_as_they_were_packed(columns):
    random = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (5, columns), dtype=torch.int8, generator=random)
    packed = pack_int4(values)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, -(-columns // 2))
    assert torch.equal(unpack_int4(packed, columns), values)


def test_even_column_is_the_low_nibble():
    assert pack_int4(torch.tensor([[1, -2, -8]], dtype=torch.int8)).tolist() == [[0xE1, 0x08]]


# ------------------------------------------------------------------------------------- the product


@pytest.mark.parametrize("activation_dtype", [None, "int8"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_product_equals_that_of_the_dequantized_weight_in_float64(grid, dtype, activation_dtype):
    weight = make_weight(grid, activation_dtype=activation_dtype)
    x = random_weight(5, 201, dtype, seed=2)
    q, scale = quantize_rows(x, num_levels(dtype, activation_dtype))
    rounded = q.double() * scale[:, None].double()
    found = linear(x, weight, wide=True)
    wide = weight.values_NK.double() * expand(weight)
    exact = rounded @ wide.T
    # A rounding to float32 for each group's sum, its scaling and its addition, and for the row's
    # scale, of sums of these absolute values.
    num_groups = weight.num_groups
    bound = (num_groups + 4) * 2**-24 * (rounded.abs() @ wide.abs().T)
    assert ((found.double() - exact).abs() <= bound).all()
    bias = random_weight(1, 33, dtype)[0]
    with_bias = (found + bias.float()).to(dtype)
    assert torch.equal(linear(x, weight, bias), with_bias)


def expand(weight):
    size = weight.group_size or weight.shape[1]
    columns = (torch.arange(weight.shape[1]) + weight.first_column) // size
    return weight.scale_NG.double()[:, columns]


@pytest.mark.parametrize("activation_dtype", [None, "int8"])
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(8, 128)], ids=str)
@pytest.mark.parametrize("cuts", [(0, 64, 128, 201), (0, 50, 70, 201), (0, 200, 201)])
def test_parts_of_a_row_add_up_to_the_whole(grid, activation_dtype, cuts):
    """Cut between groups, inside them, and twice inside one."""
    weight = make_weight(grid, activation_dtype=activation_dtype)
    x = random_weight(5, 201)
    amax = row_amax(x)
    whole = ReferenceKernel().pack(weight).sums(x, amax)
    total = torch.zeros_like(whole)
    for start, stop in pairwise(cuts):
        part = weight.columns(start, stop)
        assert torch.equal(part.dequantize(), weight.dequantize()[:, start:stop])
        total += ReferenceKernel().pack(part).sums(x[:, start:stop], amax)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5 * whole.abs().max().item())


def test_columns_of_columns_are_columns():
    weight = make_weight(Grid(4, 32))
    twice = weight.columns(40, 180).columns(30, 99)
    once = weight.columns(70, 139)
    assert twice.first_column == once.first_column == 6
    assert torch.equal(twice.scale_NG, once.scale_NG)
    assert torch.equal(twice.values_NK, once.values_NK)


def test_block_size_changes_no_bit_of_a_grouped_product(monkeypatch):
    weight, x = make_weight(Grid(4, 32), rows=100), random_weight(7, 201)
    whole = linear(x, weight)
    monkeypatch.setattr(reference, "BLOCK_BYTES", 1)
    assert torch.equal(linear(x, weight), whole)


def test_fused_groups_are_the_parts_side_by_side():
    parts = [make_weight(Grid(4, 64), rows=rows, seed=rows) for rows in (32, 8, 8)]
    x = random_weight(3, 201)
    alone = torch.cat([linear(x, part) for part in parts], dim=1)
    assert torch.equal(linear(x, fuse(parts)), alone)


def test_parts_of_unequal_schemes_are_never_fused():
    with pytest.raises(AssertionError, match="one product, one scheme"):
        fuse([make_weight(Grid(4, 64)), make_weight(Grid(4, 32))])
    begins_inside = make_weight(Grid(4, 64)).columns(32, 201)
    with pytest.raises(AssertionError, match="one product, one scheme"):
        fuse([make_weight(Grid(4, 64), columns=169), begins_inside])


@pytest.mark.parametrize("group_size", [None, 32])
def test_nibbles_lie_in_memory_as_nibbles(group_size):
    weight = make_weight(Grid(4, group_size)).columns(0, 200)
    packed = ReferenceKernel().pack(weight)
    num_scales = 33 * weight.num_groups
    assert packed.nbytes == 33 * 100 + 4 * num_scales


def test_row_with_a_nan_gives_nan_and_spares_the_others():
    x = random_weight(3, 201)
    x[0, 5], x[2, 7] = torch.nan, torch.inf
    out = linear(x, make_weight(Grid(4, 32)))
    assert out[0].isnan().all()
    assert out[2].isnan().all()
    assert out[1].isfinite().all()


def test_linear_scheme_of_a_weight_is_what_made_it():
    scheme = LinearScheme("int4", 64, "int8")
    assert round_to_nearest(random_weight(), scheme).scheme == scheme
