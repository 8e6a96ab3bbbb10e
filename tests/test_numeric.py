"""The arithmetic of quantization, against its definition."""

from __future__ import annotations

import pytest
import torch

from quant.linear import linear
from quant.numeric import Grid, dequantize, dequantize_into
from quant.rounding import quantize, weight_scale
from quant.scheme import QuantError, QuantScheme
from quant.weight import QuantizedWeight

INT8 = Grid()
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(rows: int = 33, columns: int = 70, dtype: torch.dtype = torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_integers_are_the_rounded_quotient_by_the_stored_scale(dtype):
    weight = random_weight(dtype=dtype)
    values, scale = quantize(weight, INT8)
    assert scale.dtype == dtype
    assert scale.shape == (33, 1)
    quotient = weight.double() / scale.double()
    # The largest value of a row stands at 127.5, a tie that float32 and float64 may round apart.
    is_clear = quotient.abs() < 127
    assert is_clear.float().mean() > 0.9
    assert torch.equal(values.double()[is_clear], quotient.round()[is_clear])
    assert (values.double() - quotient).abs().max() < 1


def test_scale_is_twice_the_largest_value_over_255():
    weight = random_weight()
    amax = weight.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(weight_scale(weight, INT8, torch.float32), 2 * amax / 255)


@pytest.mark.parametrize("dtype", FLOATS)
def test_error_is_at_most_half_a_step(dtype):
    """But for the largest value: 127.5 steps wide, it is clamped to 127, or a rounded scale more."""
    weight = random_weight(dtype=dtype)
    values, scale = quantize(weight, INT8)
    steps = (weight.float() - dequantize(values, scale, torch.float32)).abs() / scale.float()
    assert steps.max() <= 0.5 + 127.5 * torch.finfo(dtype).eps + 1e-4
    assert steps[values.abs() < 127].max() <= 0.5 + 1e-4


def test_zero_channel_gives_zeros_and_a_finite_scale():
    weight = random_weight()
    weight[3] = 0
    values, scale = quantize(weight, INT8)
    assert torch.isfinite(scale).all()
    assert not values[3].any()


def test_scale_that_float16_cannot_hold_is_not_zero():
    weight = torch.full((1, 4), 1e-7, dtype=torch.float16)
    values, scale = quantize(weight, INT8)
    assert scale.item() > 0
    assert values.abs().max() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight_is_refused(bad):
    weight = random_weight()
    weight[5, 7] = bad
    with pytest.raises(ValueError, match="infinity or a NaN"):
        quantize(weight, INT8)


def test_quantizing_leaves_its_input_alone():
    """The input may be the mapped file of a checkpoint that is read again."""
    weight = random_weight()
    before = weight.clone()
    weight_scale(weight, INT8, torch.float32)
    quantize(weight, INT8)
    assert torch.equal(weight, before)


def test_blocks_of_rows_change_nothing(monkeypatch):
    weight = random_weight(100, 64)
    whole = quantize(weight, INT8)
    monkeypatch.setattr("quant.rounding.BLOCK_BYTES", 7 * 64 * 4)
    for one, other in zip(whole, quantize(weight, INT8), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [1, 3, 600])
def test_quantized_linear_equals_the_dequantized_product(rows):
    weight = QuantizedWeight(*quantize(random_weight(1100, 70), INT8))
    x = random_weight(rows, 70)
    expected = x.double() @ weight.dequantize(torch.float64).T
    # float32 sums of 70 products: a few units in the last place of the largest.
    torch.testing.assert_close(linear(x, weight).double(), expected, rtol=1e-5, atol=1e-4)


def test_wide_product_of_bfloat16_keeps_float32_sums():
    x, weight = random_weight(5, 70, torch.bfloat16), random_weight(600, 70, torch.bfloat16)
    product = linear(x, weight, wide=True)
    assert product.dtype == torch.float32
    torch.testing.assert_close(
        product.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4
    )


def test_pattern_matches_the_path_or_its_last_component():
    modules = ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj", "lm_head"]
    scheme = QuantScheme(
        quant_method="rtn", weight_dtype="int8", modules_to_not_convert=("w2", "lm_*")
    )
    assert scheme.left_out(modules) == {modules[0], "lm_head"}


def test_pattern_that_matches_nothing_is_an_error():
    scheme = QuantScheme(
        quant_method="rtn", weight_dtype="int8", modules_to_not_convert=("dwon_proj",)
    )
    with pytest.raises(QuantError, match="'dwon_proj', which matches no module"):
        scheme.left_out(["model.layers.0.mlp.down_proj"])


def test_typo_in_a_dtype_is_refused_with_the_nearest():
    with pytest.raises(QuantError, match=r"'int-8'; did you mean int8\?"):
        QuantScheme(quant_method="rtn", weight_dtype="int-8")


@pytest.mark.parametrize(
    "fields",
    [
        {"quant_method": "rtn"},
        {"weight_dtype": "int8"},
        {"weight_dtype": "int4", "kvcache_dtype": "int8"},
        {"quant_method": "rtn", "weight_dtype": "int8", "group_size": 128},
        {"quant_method": "smooth_quant", "weight_dtype": "int8"},
        {"quant_method": "rtn", "kvcache_dtype": "int4"},
        {"quant_method": "rtn", "weight_dtype": "int8", "algorithm_args": {"alpha": 0.5}},
    ],
)
def test_what_cannot_be_run_is_refused_and_never_dropped(fields):
    with pytest.raises(QuantError):
        QuantScheme(**fields)


def test_scheme_survives_its_dictionary():
    scheme = QuantScheme(quant_method="rtn", weight_dtype="int8", modules_to_not_convert=())
    assert QuantScheme.from_dict(scheme.to_dict()) == scheme


@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("columns", [32, 100, 128, 320])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_dequantizing_into_a_place_gives_the_same_bits(group_size, columns, scale_dtype):
    """Also where the last group is short."""
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    values, scale = quantize(weight, Grid(8, group_size), scale_dtype)
    place = torch.full((5, columns), torch.nan)
    found = dequantize_into(place, values, scale, group_size)
    assert found is place
    assert torch.equal(found, dequantize(values, scale, torch.float32, group_size))


@pytest.mark.parametrize("bits", [4, 8])
def test_float32_scale_is_the_correctly_rounded_quotient(bits):
    """One ulp more would round every largest negative value of a group towards zero."""
    amax = torch.rand(4096, 1, generator=torch.Generator().manual_seed(0)) + 0.01
    expected = (2 * amax.double() / (2**bits - 1)).float()
    assert torch.equal(weight_scale(amax, Grid(bits), torch.float32), expected)
