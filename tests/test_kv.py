"""The int8 KV cache's arithmetic, in torch and in C, and attention over it."""

from __future__ import annotations

import pytest
import torch

from parallel.generation.cache import KVCache
from quant import attention
from quant.attention import int8_decode_attention, write_int8_slots
from quant.kernels.native import step as native
from quant.kernels.native.calls import instruction_sets, is_available
from quant.kv import NOT_FINITE, Int8Store, dequantize, quantize_channels, quantize_tokens
from tests.test_attention import SHAPES, case, exact, windowed

TINY = torch.finfo(torch.float32).tiny
needs_c = pytest.mark.skipif(not is_available(), reason="no C compiler at installation")
SETS = list(instruction_sets().items()) if is_available() else []
# Attention and writing know two sets: the portable one and, for all wider ones, AVX2.
C_PATHS = [name for name, _ in SETS if name in ("portable", "avx2")]


@pytest.fixture(params=[*C_PATHS, "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(attention.native, "can_attend", lambda *_: False)
        monkeypatch.setattr(attention.native, "can_write_int8", lambda *_: False)
    else:
        monkeypatch.setattr(native, "widest", lambda: dict(SETS)[request.param])
    return request.param


def awkward(dtype):
    """[T, H, C]: ordinary rows, and every kind that a rule is needed for."""
    x = torch.randn(9, 3, 48, generator=torch.Generator().manual_seed(0)) * 7
    x[1, 0] = 0
    x[2, 1, 5] = torch.inf
    x[3, 2, 7] = torch.nan
    x[4, 0, 47] = -torch.inf
    x[5] = torch.arange(48) - 20.5  # ties under a scale of one
    x[5, :, 0] = -127
    x[6, 1] *= 1e-39  # a scale below the smallest normal number
    x[7, 2] *= 3e37
    return x.to(dtype)


def test_integers_are_the_nearest_of_127_steps_of_the_largest():
    x = awkward(torch.float32)[[0, 5, 8]]
    values, scale = quantize_tokens(x)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, x.abs().amax(2) / 127)
    assert values.abs().amax(2).eq(127).all()
    # Half a step, and the two roundings of float32.
    error = (values.double() * scale.double().unsqueeze(2) - x.double()).abs()
    assert (error <= scale.unsqueeze(2) * (0.5 + 1e-4)).all()


def test_ties_are_rounded_to_even():
    values, scale = quantize_tokens(awkward(torch.float32)[5:6])
    assert scale.eq(1).all()
    assert values[0, 0, [20, 21, 22, 23]].tolist() == [0, 0, 2, 2]


def test_row_of_zeros_comes_back_as_zeros():
    values, scale = quantize_tokens(torch.zeros(1, 2, 16))
    assert scale.eq(TINY).all()
    assert dequantize(values, scale.unsqueeze(2), torch.bfloat16).eq(0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_row_that_is_not_finite_reads_as_nan_and_no_other_does(bad):
    x = torch.randn(2, 2, 16)
    x[1, 0, 3] = bad
    values, scale = quantize_tokens(x)
    found = dequantize(values, scale.unsqueeze(2), torch.float32)
    assert found[1, 0].isnan().all()
    assert found.isnan().sum() == 16


def test_static_scales_saturate_and_mark_what_is_not_finite():
    x = torch.tensor([0.0, 1.49, -1.51, 400.0, -400.0, 1e38, torch.nan, -torch.inf])
    values = quantize_channels(x[None, None], torch.full((1, 8), 1.0))
    assert values.tolist() == [[[0, 1, -2, 127, -127, 127, NOT_FINITE, NOT_FINITE]]]
    found = dequantize(values, torch.full((1, 8), 0.5), torch.float32)
    assert found.isnan().tolist() == [[[False] * 6 + [True] * 2]]
    assert found[0, 0, 3] == 63.5


def empty_store(heads, slots, channels, scales=None):
    """A view by slot of a cache whose heads lie apart."""
    held = torch.zeros(2, heads, slots + 3, channels, dtype=torch.int8)[:, :, :slots]
    if scales is not None:
        return Int8Store(held[0], held[1], *scales, is_static=True)
    scale = torch.zeros(2, heads, slots + 3)[:, :, :slots]
    return Int8Store(held[0], held[1], scale[0], scale[1], is_static=False)


@needs_c
@pytest.mark.parametrize("is_static", [False, True], ids=["per token", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", C_PATHS, indirect=True)
def test_c_writes_the_bits_of_torch(path, dtype, is_static):
    x = awkward(dtype)
    _, heads, channels = x.shape
    side_by_side = torch.cat((x, x.flip(0)), dim=1)
    k, v = side_by_side.split(heads, dim=1)
    slots = torch.tensor([20, 3, 4, 11, 0, 1, 2, 7, 8])
    scales = (torch.rand(heads, channels) + 0.01, torch.rand(heads, channels) + 0.01)
    found, wanted = (
        empty_store(heads, 24, channels, scales if is_static else None) for _ in range(2)
    )
    assert native.can_write_int8(k, v)
    write_int8_slots(k, v, slots, found)
    wanted.write(k, v, slots)
    for name in ("keys", "values", "key_scale", "value_scale"):
        # As bits, a NaN equals itself.
        a, b = getattr(found, name), getattr(wanted, name)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert wanted.keys[:, 5].eq(0).all()


def int8_case(shape, dtype, is_static):
    """As in test_attention: queries, a view by rows of integers, positions, mask."""
    q, keys, values, positions, mask = case(shape, dtype)
    batch, kv_heads, length, channels = keys.shape
    scales = (0.01 + 0.03 * torch.rand(2, kv_heads, channels)) if is_static else None
    store = empty_store(kv_heads, batch * length, channels, scales)
    # Slots: the positions of one sequence after those of another.
    by_token = [x.transpose(1, 2).flatten(0, 1) for x in (keys, values)]
    store.write(*by_token, torch.arange(batch * length))
    return q, by_rows(store, batch), positions, mask


def by_rows(store, batch):
    """The same numbers by row: [B, H, L, ...] views of [H, S, ...]."""

    def view(x):
        return x.unflatten(1, (batch, -1)).transpose(0, 1)

    scales = (store.key_scale, store.value_scale)
    if not store.is_static:
        scales = tuple(map(view, scales))
    return Int8Store(view(store.keys), view(store.values), *scales, store.is_static)


@pytest.mark.parametrize("is_static", [False, True], ids=["per token", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_attention_over_integers_is_that_of_float64(shape, dtype, is_static, path):
    q, store, positions, mask = int8_case(shape, dtype, is_static)
    found = int8_decode_attention(q, store, positions, lambda: mask)
    assert found.dtype == dtype
    wanted = exact(q, *store.dequantize(torch.float64), mask)
    # float32: a few roundings of the sums. bfloat16: C rounds the output alone; torch is given keys
    # and values rounded to 8 bits, which moves scores of up to 12 by some hundredths.
    limits = {torch.float32: 3e-6, torch.bfloat16: 2**-8 if path != "torch" else 2**-5}
    assert (found - wanted).norm() <= limits[dtype] * wanted.norm()


@pytest.mark.parametrize("is_static", [False, True], ids=["per token", "static"])
@pytest.mark.parametrize("window", [1, 63, 70, 200])
@pytest.mark.parametrize("groups", [1, 4])
def test_window_over_integers_is_that_of_float64(groups, window, is_static, path):
    q, store, positions, mask = int8_case((3, 2, groups, 32, 130), torch.float32, is_static)
    mask = windowed(mask, positions, window)
    found = int8_decode_attention(q, store, positions, lambda: mask, window)
    wanted = exact(q, *store.dequantize(torch.float64), mask)
    assert (found - wanted).norm() <= 3e-6 * wanted.norm()  # a few roundings of the sums


@needs_c
@pytest.mark.parametrize("is_static", [False, True], ids=["per token", "static"])
@pytest.mark.parametrize("path", C_PATHS, indirect=True)
def test_head_gives_the_same_bits_whatever_shares_its_integers(path, is_static):
    """So a rank's heads give the bits of one rank, also where it has some of a kv head's queries."""
    q, store, positions, mask = int8_case((3, 2, 4, 80, 130), torch.float32, is_static)
    whole = int8_decode_attention(q, store, positions, lambda: mask)
    scales = (store.key_scale, store.value_scale)
    cut = (slice(1, 2), slice(1, 2))
    scales = (x[1:] if is_static else x[cut] for x in scales)
    part = Int8Store(store.keys[cut], store.values[cut], *scales, is_static)
    for heads in (slice(4, 8), slice(5, 6), slice(6, 8)):
        alone = int8_decode_attention(q[1:2, heads], part, positions[1:2], lambda: None)
        assert torch.equal(alone, whole[1:2, heads])


@pytest.mark.parametrize("is_static", [False, True], ids=["per token", "static"])
def test_nan_of_a_key_or_value_is_not_hidden(is_static, path):
    for part in range(2):
        scales = (torch.full((1, 32), 0.05),) * 2 if is_static else None
        store = empty_store(1, 80, 32, scales)
        given = torch.randn(2, 80, 1, 32, generator=torch.Generator().manual_seed(0))
        given[part, 3, 0, 5] = torch.nan
        write_int8_slots(*given, torch.arange(80), store)
        rows = by_rows(store, 1)
        found = int8_decode_attention(torch.ones(1, 2, 32), rows, torch.tensor([79]), lambda: None)
        assert found[..., 5].isnan().all()
        before = rows.part((slice(None), slice(None), slice(3)))
        found = int8_decode_attention(torch.ones(1, 2, 32), before, torch.tensor([2]), lambda: None)
        assert found.isfinite().all()


def cache(granularity, **how):
    scales = [(torch.full((2, 16), 0.1), torch.full((2, 16), 0.2))] * 3
    return KVCache(
        3, 2, 16, 4, 9, torch.float32, torch.device("cpu"), granularity=granularity,
        scales=scales if granularity == "per_channel" else (), **how,
    )  # fmt: skip


@pytest.mark.parametrize("granularity", [None, "per_token", "per_channel"])
def test_row_that_moves_takes_its_integers_and_scales_along(granularity):
    held = cache(granularity)
    k, v = torch.randn(2, 5, 2, 16)
    for layer in range(3):
        held.write(layer, torch.arange(5) + 3 * 9, k * (layer + 1), v)
    wanted = [[x.clone() for x in held.row(layer, 3, 5)] for layer in range(3)]
    held.move_row(3, 1, 5)
    # Another sequence in the row it left.
    held.write(0, torch.arange(5) + 3 * 9, -k, -v)
    for layer in range(3):
        assert all(map(torch.equal, held.row(layer, 1, 5), wanted[layer]))
        # 127 steps of the largest, at most a twentieth of values near one; half a step is left.
        assert (held.row(layer, 1, 5)[0].transpose(0, 1) - k * (layer + 1)).abs().max() < 0.06


@pytest.mark.parametrize(
    ("granularity", "num_bytes"), [(None, 4 * 16), ("per_token", 16 + 4), ("per_channel", 16)]
)
def test_cache_holds_a_byte_a_number_and_four_a_scale(granularity, num_bytes):
    assert cache(granularity).nbytes == 3 * 2 * 2 * 4 * 9 * num_bytes
