"""The C passes of rounding.c give the bits of the plain ones, for every dtype, grid and shape."""

from __future__ import annotations

import pytest
import torch

from quant import rounding
from quant.kernels.native.calls import instruction_sets, is_available
from quant.numeric import Grid
from quant.rounding import quantize

GRIDS = (Grid(8), Grid(8, 64), Grid(4), Grid(4, 32), Grid(4, 128))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(not is_available(), reason="the C library was not compiled")


@pytest.fixture(params=["portable", "widest"])
def native(request, monkeypatch):
    index = 0 if request.param == "portable" else max(instruction_sets().values())
    monkeypatch.setattr(rounding.native, "widest", lambda: index)


def without_c(monkeypatch, weight, grid):
    with monkeypatch.context() as plain:
        plain.setattr(rounding.native, "takes", lambda _: False)
        return quantize(weight, grid)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.usefixtures("native")
def test_compiled_passes_give_the_bits_of_torch(monkeypatch, dtype, grid):
    torch.manual_seed(0)
    for rows, columns in ((1, 1), (7, 172), (40, 257), (3, 4096)):
        for size in (1e-7, 1e-3, 1.0, 1e3):
            weight = (torch.randn(rows, columns) * size).to(dtype)
            values, scale = quantize(weight, grid)
            wanted_values, wanted_scale = without_c(monkeypatch, weight, grid)
            assert torch.equal(values, wanted_values)
            assert torch.equal(scale.view(torch.uint8), wanted_scale.view(torch.uint8))


@pytest.mark.usefixtures("native")
def test_ties_go_to_even_and_all_zero_groups_stay_zero():
    weight = torch.cat((torch.arange(-127.5, 128.0).repeat(1, 1), torch.zeros(1, 256)))
    values, scale = quantize(weight, Grid(8))
    assert scale[:, 0].tolist() == [1.0, 1.0]
    assert values[0].tolist() == [max(-128, min(127, round(x))) for x in weight[0].tolist()]
    assert not values[1].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.usefixtures("native")
def test_what_is_not_finite_is_refused_wherever_it_stands(dtype, bad):
    for row, column in ((0, 0), (4, 130), (2, 256)):
        weight = torch.randn(5, 257).to(dtype)
        weight[row, column] = bad
        with pytest.raises(ValueError, match="infinity or a NaN"):
            quantize(weight, Grid(4, 32))


def test_rows_with_gaps_between_them_are_read_where_they_lie(monkeypatch):
    wide = torch.randn(9, 300)
    part = wide[:, 20:220]
    assert torch.equal(quantize(part, Grid(8))[0], without_c(monkeypatch, part, Grid(8))[0])
