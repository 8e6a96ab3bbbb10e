"""Scales are stored in few bits, and never so small that they clip."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from parallel.checkpoint.open import open_checkpoint
from parallel.checkpoint.shard import read_weight
from quant.errors import QuantError
from quant.kernels.native import NativeKernel, calls
from quant.kernels.reference import ReferenceKernel
from quant.methods.folding import fold
from quant.methods.gptq import GPTQArguments, factor, round_rows
from quant.methods.layer import input_scale
from quant.numeric import Grid, dequantize
from quant.rounding import quantize, weight_scale
from quant.weight import QuantizedWeight
from tests.checkpoints import write_checkpoint, write_weights
from tests.models import RTN
from tests.test_methods import distance, random_layer, sample

GRIDS = (Grid(8), Grid(4))
W4_G32 = replace(RTN, weight_dtype="int4", weight_quant_granularity="per_group", group_size=32)
DOWN = "model.layers.1.mlp.down_proj.weight"
# Of float16: below it numbers are 2 ** -24 apart, so that the first of them differ by their half.
SMALLEST_NORMAL, SMALLEST = 2.0**-14, 2.0**-24


def every_positive(dtype: torch.dtype) -> torch.Tensor:
    """Each finite positive number of a dtype of 16 bits, [N, 1] in that dtype."""
    bits = torch.arange(1, 1 << 15).to(torch.int16)
    floats = bits.view(dtype)
    return floats[floats.isfinite()].unsqueeze(1)


def nearest_scale(amax: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The rule of the scale, without any for numbers of few bits."""
    return (amax.float() / (grid.steps / 2)).to(amax.dtype)


def numpy_scale(amax: np.ndarray, grid: Grid) -> np.ndarray:
    """To nearest, or up by one number where the group would reach beyond the lowest integer."""
    scale = (amax.astype(np.float32) / np.float32(grid.steps / 2)).astype(np.float16)
    beyond = amax.astype(np.float64) / np.maximum(scale.astype(np.float64), 1e-30) > -grid.lowest
    return np.where(beyond, np.nextafter(scale, np.float16(np.inf)), scale)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_scale_is_so_small_that_its_group_lies_a_step_beyond_the_grid(dtype, grid):
    amax = every_positive(dtype)
    scale = weight_scale(amax, grid, dtype)
    assert bool((scale.double() * -grid.lowest >= amax.double()).all())
    # Nor larger than the next number above the exact one, of which the smallest is one of all.
    exact = amax.double() / (grid.steps / 2)
    assert bool(
        (scale.double() <= exact * (1 + torch.finfo(dtype).eps) + every_positive(dtype)[0]).all()
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scales_that_are_normal_numbers_are_the_nearest(dtype, grid):
    """So the integers of ordinary rows are those of compressed-tensors and of every release before."""
    amax = every_positive(dtype)
    nearest = nearest_scale(amax, grid)
    is_normal = nearest >= torch.finfo(dtype).smallest_normal
    assert is_normal.float().mean() > 0.5
    scale = weight_scale(amax, grid, dtype)
    assert torch.equal(scale[is_normal], nearest[is_normal])
    # Of subnormal ones those alone are larger that would have clipped.
    assert torch.equal(scale != nearest, nearest.double() * -grid.lowest < amax.double())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scales_of_float16_are_those_of_numpy(grid):
    amax = every_positive(torch.float16)
    wanted = numpy_scale(amax.numpy(), grid)
    assert np.array_equal(weight_scale(amax, grid, torch.float16).numpy(), wanted)


@pytest.mark.parametrize("grid", [Grid(8), Grid(8, 64), Grid(4), Grid(4, 32)], ids=str)
def test_rows_of_tiny_weights_are_off_by_a_step_of_their_scale_at_most(grid):
    """Largest weights about 1e-5: before, up to three weights of a row of 64 were clipped to 127."""
    random = torch.Generator().manual_seed(0)
    amax = torch.logspace(-7, -2, 400)[:, None]
    weight = torch.randn(400, 128, generator=random)
    weight = (weight * amax / weight.abs().amax(1, keepdim=True)).half()
    values, scale = quantize(weight, grid)
    error = (dequantize(values, scale, torch.float64, grid.group_size) - weight.double()).abs()
    step = scale.double().repeat_interleave(128 // scale.shape[1], dim=1)
    # Half a step by rounding. A scale that was rounded down leaves its largest value up to a step away.
    assert bool((error <= step).all())
    is_fit = step * (grid.highest + 0.5) >= weight.double().abs().amax(1, keepdim=True)
    assert bool((error <= step / 2)[is_fit].all())
    # The scale itself is off by 2 ** -24 at most: twice the error of storing such weights in float16.
    exact = weight.double().abs().unflatten(1, (scale.shape[1], -1)).amax(2) / (grid.steps / 2)
    is_subnormal = scale < SMALLEST_NORMAL
    assert is_subnormal.any()
    assert bool(((scale.double() - exact).abs() <= SMALLEST)[is_subnormal].all())


@pytest.mark.parametrize("largest", [7.7e-6, 8.5e-6, 8.9e-6, 1e-5, 1.14e-5])
def test_row_of_tiny_weights_loses_two_percent_at_most(largest):
    """Clipped they lost 4 to 15 %. The coarsest change is 2 ** -23 for 2 ** -24: 64 steps on either side
    for 127. Rounding then costs step / sqrt(12), 0.45 % of the largest weight, which is about 2.5 times
    the root mean square of such a row: 1.1 % of the row."""
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    weight = (weight * largest / weight.abs().max()).half()
    values, scale = quantize(weight, Grid(8))
    assert distance(dequantize(values, scale, torch.float32), weight.float()) < 0.02


def test_zero_rows_keep_the_scale_one_and_the_largest_weights_fit():
    weight = torch.tensor([[0.0, 0.0], [65504.0, -65504.0], [SMALLEST, 0.0]]).half()
    for grid in GRIDS:
        values, scale = quantize(weight, grid)
        assert scale[0] == 1
        assert not values[0].any()
        assert scale.isfinite().all()
        back = dequantize(values, scale, torch.float32)
        assert float((back - weight.float()).abs()[1].max()) <= float(scale[1])


def test_scale_that_its_dtype_cannot_hold_is_refused():
    """Folding multiplies columns in float32: they may become too large for the checkpoint's dtype."""
    weight = torch.full((1, 32), 6e5)
    assert weight_scale(weight, Grid(4), torch.float32).isfinite().all()
    with pytest.raises(
        QuantError, match="6e\\+05 that float16, the checkpoint's dtype, cannot hold"
    ):
        quantize(weight, Grid(4), torch.float16)


def test_gptq_does_not_clip_tiny_rows():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    weight = weight * 8.9e-6 / weight.abs().amax(1, keepdim=True)
    arguments = GPTQArguments()
    factored = factor(torch.eye(64), arguments)
    for grid in (Grid(8), Grid(8, 32), Grid(4, 32)):
        rounded = round_rows(weight, factored, grid, torch.float16, arguments)
        plain = quantize(weight, grid, torch.float16)
        assert torch.equal(rounded.values_NK, plain[0])
        assert torch.equal(rounded.scale_NG, plain[1])
        reach = rounded.scale_NG.float().amax(1) * -grid.lowest
        assert bool((reach >= weight.abs().amax(1)).all())


def test_static_scales_are_normal_numbers():
    amax = torch.tensor([0.0, 1e-45, 1e-37, 127.0])
    assert input_scale(amax).tolist() == [1.0, *[torch.finfo(torch.float32).tiny] * 2, 1.0]


def test_channel_that_a_fold_would_lose_in_float16_is_left_as_it_is(tmp_path):
    """A norm of 0.01 over 1e6 is zero in float16, over 1e-7 infinite: either would end the channel."""
    layer, forward = random_layer(tmp_path, torch.float16)
    layer.norms["input_layernorm"][:2] = 0.01
    x_td = sample()
    before = forward.run(layer, x_td)
    scale = torch.ones(64)
    scale[0], scale[1], scale[2] = 1e6, 1e-7, 3.0
    fold(layer, "qkv_proj", scale)
    norm, folded = layer.norms["input_layernorm"], layer.folded["qkv_proj"]
    assert norm.isfinite().all()
    assert norm[:2].tolist() == pytest.approx([0.01, 0.01], rel=1e-3)
    assert folded[:2].tolist() == [1.0, 1.0]
    assert folded[2] == pytest.approx(3.0, rel=1e-3)
    assert distance(forward.run(layer, x_td), before) < 2e-6  # float32's own rounding


@pytest.mark.skipif(not calls.is_available(), reason="no C compiler at installation")
@pytest.mark.parametrize("grid", [Grid(8), Grid(4), Grid(4, 32), Grid(8, 64)], ids=str)
def test_c_multiplies_by_subnormal_scales_as_torch_does(grid):
    random = torch.Generator().manual_seed(3)
    weight = (torch.randn(40, 128, generator=random) * 3e-6).half()
    values, scale = quantize(weight, grid)
    assert (scale < SMALLEST_NORMAL).all()
    held = QuantizedWeight(values, scale, None, grid.bits, grid.group_size)
    x = torch.randn(3, 128, generator=random) * 1e3
    found, wanted = (
        kernel.pack(held).linear(x, None, torch.float32)
        for kernel in (NativeKernel(), ReferenceKernel())
    )
    assert torch.equal(found, wanted)
    assert found.abs().min() > 0


@pytest.mark.parametrize("scheme", [RTN, W4_G32], ids=["w8a16", "w4a16 g32"])
def test_ranks_share_the_scale_of_a_tiny_row(tmp_path, scheme):
    path = write_checkpoint(tmp_path / "source", dtype=torch.float16)
    weights = load_file(path / "model.safetensors")
    down = weights[DOWN]
    # Of 1.45 times the smallest number, which would round to that one: the scale is twice that.
    largest = 1.45 * SMALLEST * (2 ** int(scheme.weight_dtype[3:]) - 1) / 2
    down[:8] *= largest / down[:8].abs().amax(1, keepdim=True)
    write_weights(path, weights)
    checkpoint = open_checkpoint(path)
    layout = checkpoint.layout(scheme)
    row = layout.table[DOWN]

    def parts(tp):
        cuts = [row.index(rank, tp) for rank in range(tp)]
        return [read_weight(layout, checkpoint.source, row, cut) for cut in cuts]

    (whole,) = parts(1)
    assert (whole.scale_NG[:8] == 2 * SMALLEST).any()
    shared = parts(2)
    assert torch.equal(torch.cat([part.values_NK for part in shared], dim=1), whole.values_NK)
    for part in shared:
        assert set(part.scale_NG.flatten().tolist()) <= set(whole.scale_NG.flatten().tolist())
