"""Every path of a product with int8 weights gives the bits of the reference."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from quant.activations import (
    LEVELS_INT8,
    RADIX,
    num_levels,
    planes,
    quantize_rows,
    row_amax,
)
from quant.errors import QuantError
from quant.kernels import choice, native
from quant.kernels.choice import is_exact, open_kernel, problem
from quant.kernels.native import calls, step
from quant.kernels.onednn import OneDnnKernel, digit_radix, digits
from quant.kernels.reference import ReferenceKernel
from quant.linear import linear
from quant.weight import QuantizedWeight, fuse

SETS = list(calls.instruction_sets()) if calls.is_available() else []
# (rows, out_features, in_features): odd sizes, one row, several panels, rounds and chunks of columns.
SHAPES = [(1, 64, 64), (3, 70, 129), (8, 33, 1026), (100, 96, 600), (2, 31, 13824), (5, 3, 1)]
SHAPES += [(241, 70, 129)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_weight(rows, columns, activation_dtype, limit=128, seed=0):
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(-limit, limit, (rows, columns), dtype=torch.int8, generator=random)
    return QuantizedWeight(values, torch.rand(rows, 1, generator=random) + 0.1, activation_dtype)


def make_rows(rows, columns, dtype):
    """Rows of different sizes, outliers a thousand times the median among them."""
    random = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns, generator=random)
    x[:, :: max(1, columns // 5)] *= 1000
    return (x * torch.logspace(-3, 1, rows)[:, None]).to(dtype)


def assert_same_bits(kernel, weight, x, bias):
    exact, packed = ReferenceKernel().pack(weight), kernel.pack(weight)
    amax = row_amax(x) * 1.5  # as of longer rows that these are parts of
    assert torch.equal(packed.sums(x, amax), exact.sums(x, amax))
    for out_dtype in (x.dtype, torch.float32):
        found = packed.linear(x, bias, out_dtype)
        assert found.dtype == out_dtype
        assert torch.equal(found, exact.linear(x, bias, out_dtype))


@pytest.mark.parametrize("activation_dtype", ["int8", None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SETS)
def test_native_gives_the_bits_of_the_reference(name, shape, dtype, activation_dtype):
    rows, out_features, in_features = shape
    weight = make_weight(out_features, in_features, activation_dtype)
    bias = torch.randn(out_features).to(dtype)
    x = make_rows(rows, in_features, dtype)
    assert_same_bits(native.NativeKernel(name), weight, x, bias)


@pytest.mark.parametrize("activation_dtype", ["int8", None])
@pytest.mark.parametrize("shape", SHAPES)
def test_onednn_gives_the_bits_of_the_reference(shape, activation_dtype):
    """On every processor: weights within 63 cannot saturate, those within 127 need VNNI."""
    limit = 128 if problem("onednn") is None else 63
    weight = make_weight(shape[1], shape[2], activation_dtype, limit)
    assert_same_bits(OneDnnKernel(), weight, make_rows(shape[0], shape[2], torch.float32), None)


@pytest.mark.skipif(not SETS, reason="no C compiler at installation")
def test_sums_of_int8_activations_do_not_wrap():
    """The largest products of the widest row of a published model, Llama 3.1 405B's FFN."""
    values = torch.full((32, 53248), -128, dtype=torch.int8)
    weight = QuantizedWeight(values, torch.ones(32, 1), "int8")
    x = torch.ones(2, 53248)
    for kernel in (ReferenceKernel(), *map(native.NativeKernel, SETS)):
        sums = kernel.pack(weight).sums(x, row_amax(x))
        assert sums.dtype == torch.int32
        assert (sums == -128 * 127 * 53248).all()


@pytest.mark.skipif(not SETS, reason="no C compiler at installation")
def test_wrong_shapes_are_caught_before_the_c_code():
    packed = native.NativeKernel().pack(make_weight(32, 64, "int8"))
    with pytest.raises(AssertionError):
        packed.linear(torch.randn(1, 128), None, torch.float32)
    with pytest.raises(AssertionError):
        packed.linear(torch.randn(1, 64), torch.zeros(31), torch.float32)


def test_big_endian_processors_have_no_c(monkeypatch):
    """Its words are little-endian: elsewhere it would multiply other columns."""
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(OSError, match="little-endian"):
        calls.open_library.__wrapped__()


def test_saturating_path_is_dropped():
    class Saturating(ReferenceKernel):
        """Pairs of products clamped to 16 bits, as oneDNN computes them without VNNI."""

        def pack(self, weight):
            packed = super().pack(weight)
            exact = packed.sums
            packed.sums = lambda x, amax: exact(x, amax).clamp(-(2**22), 2**22)
            return packed

    assert not is_exact(Saturating())


def test_unknown_or_broken_kernel_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setitem(choice.KERNELS, "native", _absent)
    with pytest.raises(QuantError, match="no C compiler"):
        open_kernel("native")


def _absent():
    raise OSError("not compiled: there was no C compiler")


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_choice_is_right_whatever_onednn_may_use(isa):
    """oneDNN reads ONEDNN_MAX_CPU_ISA once a process; the child is this test with it set."""
    script = (
        "from quant.kernels.choice import *; import json; torch.set_num_threads(1);"
        "print(json.dumps({name: problem(name) for name in KERNELS}))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    problems = json.loads(done.stdout)
    assert problems["reference"] is None
    if isa != "DEFAULT" and platform.machine() == "x86_64":
        assert "saturate" in problems["onednn"]


@pytest.mark.parametrize("levels", [127, 127 * RADIX, 127 * RADIX**2])
def test_planes_are_bytes_that_make_up_the_number(levels):
    q = torch.linspace(-levels, levels, 100_001, dtype=torch.float64).round().float()
    total = torch.zeros(len(q), dtype=torch.float64)
    for plane in planes(q, levels):
        assert plane.abs().max() <= 127
        total = total * RADIX + plane
    assert torch.equal(total, q.double())


@pytest.mark.parametrize("columns", [64, 13824, 28672, 100_000])
def test_digits_never_sum_past_what_float32_holds(columns):
    radix, levels = digit_radix(columns), 127 * RADIX**2
    q = torch.linspace(-levels, levels, 10_001, dtype=torch.float64).round().float()
    total = torch.zeros(len(q), dtype=torch.float64)
    for digit in digits(q, levels, radix):
        assert digit.abs().max() * 128 * columns <= 2**24
        total = total * radix + digit
    assert torch.equal(total, q.double())


def test_row_with_a_nan_or_an_infinity_gives_nan_and_spares_the_others():
    weight = make_weight(32, 64, None)
    x = torch.randn(3, 64)
    x[0, 5], x[2, 7] = torch.nan, torch.inf
    for kernel in (ReferenceKernel(), *(native.NativeKernel(name) for name in SETS)):
        out = linear(x, kernel.pack(weight))
        assert out[0].isnan().all()
        assert out[2].isnan().all()
        assert out[1].isfinite().all()


def test_zero_and_tiny_rows_stay_finite():
    x = torch.zeros(2, 64)
    x[1] = 1e-40
    for kernel in (ReferenceKernel(), *(native.NativeKernel(name) for name in SETS)):
        assert linear(x, kernel.pack(make_weight(32, 64, "int8"))).abs().max() < 1e-25


def relative_error(found, x, weight):
    exact = x.double() @ weight.dequantize(torch.float64).T
    return ((found.double() - exact).norm(dim=1) / exact.norm(dim=1)).max()


@pytest.mark.parametrize("columns", [1024, 5120, 13824, 28672])
@pytest.mark.parametrize("outlier", [1, 1000, 1024, 30_000])
def test_w8a16_loses_no_more_than_bfloat16_activations_would(columns, outlier):
    """The promise of w8a16, also for rows with outliers (also ones that bfloat16 holds exactly)."""
    weight = make_weight(256, columns, None)
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(1))
    x[:, ::1000] = outlier
    rounded = relative_error(x.bfloat16().double() @ weight.dequantize(torch.float64).T, x, weight)
    assert relative_error(linear(x, weight), x, weight) <= rounded
    short = x.bfloat16()
    assert relative_error(linear(short, weight), short.double(), weight) <= 2**-9


def test_int8_activations_are_scaled_by_token():
    x = torch.tensor([[1.0, -2.0, 0.5, 127.0], [0.0, 0.0, 0.0, 0.0]])
    q, scale = quantize_rows(x, LEVELS_INT8)
    assert q[0].tolist() == [1, -2, 0, 127]  # ties to even
    assert scale[0] == 1
    assert q[1].tolist() == [0, 0, 0, 0]


def test_number_of_levels_follows_the_dtype():
    assert num_levels(torch.float32, "int8") == 127
    assert num_levels(torch.bfloat16, None) == 127 * 254
    assert num_levels(torch.float32, None) == 127 * 254**2


def test_fused_product_is_the_parts_side_by_side():
    parts = [make_weight(rows, 64, "int8", seed=rows) for rows in (32, 8, 8)]
    x = torch.randn(3, 64)
    for kernel in (ReferenceKernel(), *(native.NativeKernel(name) for name in SETS)):
        alone = torch.cat([linear(x, kernel.pack(part)) for part in parts], dim=1)
        assert torch.equal(linear(x, kernel.pack(fuse(parts))), alone)


@pytest.mark.skipif(not SETS, reason="no C compiler at installation")
@pytest.mark.parametrize(
    "shape", [(1, 64, 64), (3, 70, 129), (8, 96, 1024), (5, 1, 7), (12, 2, 40)]
)
def test_native_bfloat16_product_has_float32_sums(shape):
    rows, out_features, in_features = shape
    x, weight = torch.randn(rows, in_features).bfloat16(), torch.randn(out_features, in_features)
    weight, bias = weight.bfloat16(), torch.randn(out_features)
    exact = x.double() @ weight.double().T + bias
    found = step.linear_bfloat16(x, weight, bias, torch.float32)
    # bfloat16 products are exact in float32; what is lost are the roundings of a sum of that many.
    assert (found - exact).norm() <= 2**-22 * in_features**0.5 * exact.norm()
    # A row's bits depend on no other row, nor a channel's on other channels.
    assert torch.equal(step.linear_bfloat16(x[-1:], weight, bias, torch.float32), found[-1:])
    assert torch.equal(
        step.linear_bfloat16(x, weight[-1:], bias[-1:], torch.float32), found[:, -1:]
    )
