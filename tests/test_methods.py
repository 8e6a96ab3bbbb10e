"""The methods of quantization, one decoder layer or one weight at a time, against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parallel.calibration.forward import LayerForward
from parallel.calibration.read import read_layer
from parallel.checkpoint.open import open_checkpoint
from quant.calibrate import ChannelAmax, ChannelMean, Hessian, TensorAmax, channel_mean
from quant.errors import QuantError
from quant.inputs import INPUTS
from quant.methods.awq import awq_scales, best_scale
from quant.methods.folding import fold, share
from quant.methods.gptq import GPTQArguments, factor, round_rows
from quant.methods.layer import Layer, Product, Rounded
from quant.methods.smooth_quant import smooth, smooth_scale
from quant.numeric import Grid, dequantize
from quant.rounding import quantize, weight_scale
from tests.checkpoints import write_checkpoint

FAMILIES = {
    "grouped-query": {},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    "multi-head, all biases": {
        "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 24, "attention_bias": True},
    "window": {"architectures": ["MistralForCausalLM"], "sliding_window": 8},
}  # fmt: skip
G32 = Grid(4, 32)


def random_layer(path: Path, dtype: torch.dtype = torch.float32, **config) -> tuple:
    """A layer, and what runs it on a sample."""
    checkpoint = open_checkpoint(write_checkpoint(path, dtype=dtype, **config))
    forward = LayerForward(checkpoint.config, torch.float32, 32)
    return read_layer(checkpoint.source, checkpoint.config, 1), forward


def sample(width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(32, width, generator=torch.Generator().manual_seed(seed))


def input_amax(layer: Layer, forward: LayerForward, x_td: torch.Tensor) -> dict:
    """The largest absolute value of each channel of each input."""
    seen: dict[str, torch.Tensor] = {}
    forward.run(layer, x_td, lambda name, x: seen.setdefault(name, x.clone()))
    return {name: seen[name].abs().amax(dim=0) for name in INPUTS}


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# SmoothQuant and folding


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smooth_scale_is_the_papers_formula(alpha):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(50, generator=generator) * 100
    w = torch.rand(50, generator=generator)
    x[3], w[4] = 1e-9, 1e-9  # below the clamp of 1e-5
    found = smooth_scale(x, w, alpha)
    for k in range(50):
        top = max(x[k].item(), 1e-5) ** alpha
        wanted = max(top / max(w[k].item(), 1e-5) ** (1 - alpha), 1e-5)
        # Computed in float64 and rounded to float32 once.
        assert found[k].item() == pytest.approx(wanted, rel=1.2e-7)


def test_a_channel_that_is_silent_on_every_sample_is_left_alone():
    x, w = torch.tensor([0.0, 4.0, 4.0]), torch.tensor([1.0, 0.0, 4.0])
    assert smooth_scale(x, w, 0.5).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_smoothing_all_inputs_leaves_the_float_output_as_it_was(tmp_path, family):
    layer, forward = random_layer(tmp_path, **family)
    x_td = sample()
    before = forward.run(layer, x_td)
    for name, amax in input_amax(layer, forward, x_td).items():
        smooth(layer, name, amax, 0.5)
    assert set(layer.folded) == set(INPUTS)
    assert all(scale.std() > 0.05 for scale in layer.folded.values()), "the scales do something"
    # A product and a quotient by each scale, rounded to float32 (6e-8 each), in a chain of four.
    assert distance(forward.run(layer, x_td), before) < 2e-6


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_folded_floats_are_plain_weights_of_the_same_layer(tmp_path, family):
    """Nothing is left to multiply at run time: the materialized weights alone say everything."""
    layer, forward = random_layer(tmp_path, **family)
    x_td = sample()
    before = forward.run(layer, x_td)
    for name, amax in input_amax(layer, forward, x_td).items():
        smooth(layer, name, amax, 0.7)
    plain = {
        name: Product(product.folded(torch.float32), product.bias_N)
        for name, product in layer.products.items()
    }
    assert distance(forward.run(replace(layer, products=plain), x_td), before) < 2e-6


def test_a_norm_rounded_to_16_bits_costs_nothing(tmp_path):
    """The products are multiplied by what the rounded norm was divided by in fact."""
    layer, forward = random_layer(tmp_path, torch.bfloat16)
    x_td = sample()
    before = forward.run(layer, x_td)
    fold(layer, "qkv_proj", torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.3)
    assert layer.norms["input_layernorm"].dtype == torch.bfloat16
    # bfloat16 rounds by up to 4e-3; float32 by 6e-8.
    assert distance(forward.run(layer, x_td), before) < 2e-6


def test_the_query_heads_of_a_kv_head_share_the_scale_of_o_proj(tmp_path):
    layer, forward = random_layer(tmp_path)
    amax = input_amax(layer, forward, sample())["o_proj"]
    shared = share(layer, "o_proj", amax).view(2, 2, 16)
    assert torch.equal(shared[:, 0], shared[:, 1])
    assert torch.equal(shared[:, 0], amax.view(2, 2, 16).amax(dim=1))
    assert not torch.equal(shared.flatten(), amax)
    with pytest.raises(AssertionError, match="heads share"):
        fold(layer, "o_proj", amax)


def test_the_bias_of_v_proj_is_divided_with_its_rows(tmp_path):
    layer, forward = random_layer(tmp_path, **FAMILIES["qwen2"])
    bias = layer.products["v_proj"].bias_N
    smooth(layer, "o_proj", input_amax(layer, forward, sample())["o_proj"], 0.5)
    scale = layer.folded["o_proj"].view(2, 2, 16)[:, 0].flatten()
    assert bias.abs().min() > 0
    assert torch.equal(layer.products["v_proj"].bias_N, bias / scale)
    assert "v_proj.bias" in layer.changed


# GPTQ


def correlated(num_columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs whose channels go together, one of them twenty times as large."""
    generator = torch.Generator().manual_seed(seed)
    mix = 0.2 * torch.randn(num_columns, num_columns, generator=generator)
    x = torch.randn(3 * num_columns, num_columns, generator=generator)
    x = x @ (mix + torch.eye(num_columns))
    x[:, 5] *= 20
    return x


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    observer = Hessian(x.shape[1])
    for part in x.split(100):
        observer.update(part)
    return observer.hessian_KK


def column_by_column(weight, hessian, grid, scale_dtype, arguments):
    """Optimal brain quantization in float64: round a column, move the others by the inverse of the
    Hessian, strike the column out of it. Written from the paper; no Cholesky, no blocks."""
    weight, hessian = weight.double().clone(), hessian.double()
    num_columns = weight.shape[1]
    hessian = hessian + arguments.damp_percent * hessian.diagonal().mean() * torch.eye(
        num_columns, dtype=torch.float64
    )
    order = range(num_columns)
    if arguments.desc_act:
        order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    size = grid.group_size or num_columns
    scales = weight_scale(weight.float(), grid, scale_dtype)
    late = grid.group_size is not None and not arguments.static_groups
    inverse = torch.linalg.inv(hessian)
    values = torch.zeros(weight.shape, dtype=torch.int8)
    for j in order:
        if late and j % size == 0:
            group = weight[:, j : j + size].float()
            scales[:, j // size] = weight_scale(group, Grid(grid.bits), scale_dtype)[:, 0]
        scale = scales[:, j // size].double()
        q = (weight[:, j] / scale).round().clamp(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1)
        values[:, j] = q
        error = (weight[:, j] - q * scale) / inverse[j, j]
        weight -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j, None] * inverse[j] / inverse[j, j]
    return values, scales


ARGUMENTS = {
    "plain": GPTQArguments(),
    "static groups": GPTQArguments(static_groups=True),
    "desc_act": GPTQArguments(desc_act=True, static_groups=True, damp_percent=0.05),
}


@pytest.mark.parametrize("grid", [Grid(8), Grid(4), G32, Grid(4, 128)], ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_gptq_gives_the_integers_of_the_column_by_column_algorithm(grid, arguments):
    """Scales are stored in bfloat16: the largest value of a group is then no exact tie of -7.5."""
    x = correlated(328)  # a last group of 8 columns
    weight = torch.randn(64, 328, generator=torch.Generator().manual_seed(1))
    hessian = hessian_of(x)
    wanted, scales = column_by_column(
        weight, hessian.tril() + hessian.tril(-1).T, grid, torch.bfloat16, arguments
    )
    found = round_rows(weight, factor(hessian, arguments), grid, torch.bfloat16, arguments)
    # float32 against float64: a value near the middle of two integers may go the other way, and
    # then every later column of its row may.
    assert (found.values_NK == wanted).float().mean() > 0.99
    assert (found.scale_NG == scales).float().mean() > 0.99


@pytest.mark.parametrize("grid", [Grid(8), Grid(4), G32], ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_gptq_halves_the_error_of_rounding_to_nearest(grid, arguments):
    x = correlated(320)
    weight = torch.randn(64, 320, generator=torch.Generator().manual_seed(1))
    found = round_rows(weight, factor(hessian_of(x), arguments), grid, torch.float32, arguments)
    nearest = dequantize(*quantize(weight, grid), torch.float32, grid.group_size)
    wanted = x @ weight.T
    plain = distance(x @ nearest.T, wanted)
    assert distance(x @ found.rows(slice(None), torch.float32).T, wanted) < 0.6 * plain


def test_a_column_that_was_never_used_spoils_nothing():
    x = correlated(96)
    x[:, 40] = 0
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(1))
    arguments = GPTQArguments()
    found = round_rows(weight, factor(hessian_of(x), arguments), Grid(8), torch.float32, arguments)
    nearest, _ = quantize(weight, Grid(8))
    assert torch.equal(found.values_NK[:, 40], nearest[:, 40])


def test_gptq_refuses_a_hessian_that_is_not_positive_definite():
    hessian = -torch.eye(8)
    with pytest.raises(QuantError, match="damp_percent"):
        factor(hessian, GPTQArguments())


def test_gptq_refuses_a_damaged_weight():
    weight = torch.ones(4, 32)
    weight[1, 2] = torch.nan
    arguments = GPTQArguments()
    with pytest.raises(ValueError, match="infinity or a NaN"):
        round_rows(weight, factor(torch.eye(32), arguments), Grid(8), torch.float32, arguments)


@pytest.mark.parametrize(
    ("arguments", "grid", "word"),
    [
        (GPTQArguments(damp_percent=0.0), Grid(8), "damp_percent"),
        (GPTQArguments(damp_percent=1.5), Grid(8), "damp_percent"),
        (GPTQArguments(desc_act=True), G32, "desc_act"),
    ],
)
def test_gptq_arguments_that_cannot_be_computed_are_refused(arguments, grid, word):
    with pytest.raises(QuantError, match=word):
        arguments.check(grid)


def test_desc_act_goes_with_one_scale_a_channel_or_static_groups():
    GPTQArguments(desc_act=True).check(Grid(4))
    GPTQArguments(desc_act=True, static_groups=True).check(G32)


FACTOR_SCRIPT = """
import torch
from quant.methods.gptq import GPTQArguments, factor
from tests.memory import watch_memory
torch.set_num_threads(1)
x = torch.randn(4096, 4096)
hessian = x @ x.T
factor(hessian[:512, :512].clone(), GPTQArguments())  # what LAPACK needs for itself
address = hessian.data_ptr()
factored, peak, after = watch_memory(lambda: factor(hessian, GPTQArguments(desc_act=True)))
print(peak / hessian.nbytes, after / hessian.nbytes, factored.lower_KK.data_ptr() == address)
"""


def test_a_hessian_is_factored_in_place_with_one_more_of_its_size_beside_it():
    done = subprocess.run(
        [sys.executable, "-c", FACTOR_SCRIPT], cwd=Path(__file__).parents[1], timeout=60,
        capture_output=True, text=True, env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, after, is_in_place = done.stdout.split()
    # Beside the copy, strips of 128 of the 4096 rows are in hand, and what LAPACK keeps for itself.
    assert float(peak) < 1.5
    # A few strips that the allocator has not given back.
    assert float(after) < 0.3
    assert is_in_place == "True"


# AWQ


def test_awq_scales_are_the_formula_of_its_authors(tmp_path):
    layer, _ = random_layer(tmp_path)
    mean = torch.rand(64, generator=torch.Generator().manual_seed(3)) + 0.1
    found = awq_scales(layer, "qkv_proj", mean, G32)
    assert torch.equal(found[0], torch.ones(64))
    weights = torch.cat([layer.products[name].weight for name in INPUTS["qkv_proj"]]).double()
    groups = weights.view(-1, 2, 32).abs()
    relative = (groups / groups.amax(dim=2, keepdim=True)).view(-1, 64).mean(dim=0)
    for step in range(20):
        ratio = step / 20
        wanted = mean.double() ** ratio / (relative ** (1 - ratio) + 1e-4)
        wanted = wanted / (wanted.max() * wanted.min()).sqrt()
        # Means of 6e-8 accuracy, and one rounding to float32.
        assert torch.allclose(found[1 + step].double(), wanted, rtol=1e-6, atol=0)


def test_the_first_of_the_best_scales_is_taken():
    candidates = [torch.full((1,), value) for value in (3.0, 1.0, 2.0, 1.0)]
    assert best_scale(candidates, lambda scale: float(scale)) is candidates[1]


# Observers


def test_observers_keep_what_float64_keeps():
    x = correlated(40)
    observers = ChannelAmax(40), TensorAmax(), ChannelMean(40), Hessian(40)
    for part in x.split(17):
        for observer in observers:
            observer.update(part)
    amax, whole, mean, hessian = (
        {name: tensor for name, (tensor, _) in observer.state().items()} for observer in observers
    )
    assert torch.equal(amax["amax"], x.abs().amax(dim=0))
    assert whole["amax"].item() == x.abs().max().item()
    assert torch.allclose(channel_mean(mean).double(), x.double().abs().mean(dim=0), rtol=1e-7)
    wanted = (x.double().T @ x.double()).tril()
    # 120 products added in float32.
    assert distance(hessian["hessian"].tril(), wanted) < 1e-6


def test_a_hessian_is_whole_across_its_strips():
    """More channels than are worked on at a time."""
    x = torch.randn(20, 1100, generator=torch.Generator().manual_seed(0))
    assert distance(hessian_of(x).tril(), (x.double().T @ x.double()).tril()) < 1e-6


def test_a_rounded_product_multiplies_what_its_integers_stand_for():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(300, 96, generator=generator), torch.randn(5, 96, generator=generator)
    values, scale = quantize(weight, G32)
    product = Product(Rounded(values, scale, 32), torch.arange(300.0))
    wanted = x @ dequantize(values, scale, torch.float32, 32).T + torch.arange(300.0)
    # Blocks of 256 rows: other bits, the same sums.
    assert distance(product(x), wanted) < 1e-6
    static = replace(product, static_amax=torch.tensor([2.0]))
    rounded = (x / (2 / 127)).round().clamp(-128, 127) * (2 / 127)
    assert distance(static(x), product(rounded)) < 1e-6
    assert distance(static(x), wanted) > 1e-3
    dynamic = replace(product, is_dynamic=True)
    steps = x.abs().amax(dim=1, keepdim=True) / 127
    assert distance(dynamic(x), product((x / steps).round() * steps)) < 1e-6
