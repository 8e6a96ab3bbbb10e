"""Norm, activation and rotary angles in C against torch's operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from quant import elementwise
from quant.elementwise import norm_heads, rms_norm, rotate, silu_product
from quant.kernels.native.calls import is_available

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """Both ways; the native one only where it was compiled and takes such tensors."""
    torch.manual_seed(0)
    if request.param == "torch":
        monkeypatch.setattr(elementwise.native, "takes", lambda *_: False)
    elif not is_available():
        pytest.skip("no C compiler at installation")


def assert_close(found, wanted):
    """bfloat16: the sums' order may turn one rounding; float32: a few units of the last place."""
    rtol = 2**-7 if found.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol)  # terms of about 1 cancel


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 5120), (70, 600), (2, 30)])
def test_norm_is_that_of_torch_and_adds_the_residual_in_place(shape, dtype):
    x, delta, weight = (torch.randn(size).to(dtype) for size in (shape, shape, shape[1]))
    wanted = weight * torch.rms_norm(x, (shape[1],), None, 1e-5)
    assert_close(rms_norm(x.clone(), weight, 1e-5), wanted)
    summed, before = x + delta, x.clone()
    found = rms_norm(before, weight, 1e-5, delta)
    assert torch.equal(before, summed)
    assert_close(found, weight * torch.rms_norm(summed, (shape[1],), None, 1e-5))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "channels"), [(1, 128), (70, 48), (3, 12)])
def test_heads_are_normed_by_themselves_and_the_last_ones_left(tokens, channels, dtype):
    x = torch.randn(tokens, 7, channels).to(dtype)
    q_weight, k_weight = torch.randn(2, channels).to(dtype)
    found = x.clone().flatten(1)
    norm_heads(found, (3, 2), (q_weight, k_weight), 1e-5)
    found = found.view_as(x)
    plain = torch.rms_norm(x, (channels,), None, 1e-5)
    assert_close(found[:, :3], q_weight * plain[:, :3])
    assert_close(found[:, 3:5], k_weight * plain[:, 3:5])
    assert torch.equal(found[:, 5:], x[:, 5:])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(64, 64), (13, 13)])
def test_silu_product_is_that_of_torch(sizes, dtype):
    gate_up = (torch.randn(5, sum(sizes)) * 30).to(dtype)
    gate, up = gate_up.split(sizes, dim=1)
    assert_close(silu_product(gate_up, sizes), F.silu(gate) * up)
    falling = torch.tensor([[-1e30] * 8 + [1.0] * 8], dtype=dtype)
    assert silu_product(falling, (8, 8)).abs().max() == 0
    assert silu_product(torch.zeros(1, 128, dtype=dtype), (64, 64)).tolist() == [[0.0] * 64]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [16, 24, 128])
def test_rotation_turns_the_first_heads_and_leaves_the_rest(channels, dtype):
    tokens, heads = 7, 5
    x = torch.randn(tokens, heads, channels).to(dtype)
    angles = torch.randn(20, 1, channels // 2)
    positions = torch.tensor([3, 4, 5, 19, 0, 7, 7])
    cos, sin = angles.cos().repeat(1, 1, 2).to(dtype), angles.sin()
    sin = torch.cat((-sin, sin), -1).to(dtype)
    wanted = x * cos[positions] + x.roll(channels // 2, -1) * sin[positions]
    found = x.clone().flatten(1)
    rotate(found, 3, cos, sin, positions)
    found = found.view_as(x)
    # bfloat16: the two products are rounded before they are added up, or only their sum is.
    atol = 2e-2 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(found[:, :3], wanted[:, :3], rtol=2**-7, atol=atol)
    assert torch.equal(found[:, 3:], x[:, 3:])


@pytest.mark.usefixtures("path")
def test_nan_stays_nan():
    x = torch.randn(2, 64)
    x[0, 3] = torch.nan
    assert rms_norm(x, torch.ones(64), 1e-5)[0].isnan().all()
    assert silu_product(x, (32, 32))[0, 3].isnan()
