"""Decode attention in C against float64 and against torch's own."""

from __future__ import annotations

import pytest
import torch

from quant import attention
from quant.attention import decode_attention
from quant.kernels.native import step as native
from quant.kernels.native.calls import is_available

# (sequences, kv heads, query heads of each, head_dim, positions): one piece and several, one group
# and many, lengths that end inside a piece.
SHAPES = [
    (1, 2, 1, 64, 5),
    (3, 2, 4, 16, 130),
    (2, 1, 8, 128, 200),
    (1, 4, 1, 128, 64),
    (2, 2, 16, 32, 1),
]


def case(shape, dtype):
    """A step's queries and views of a cache whose rows are longer than what is in use."""
    batch, kv_heads, groups, channels, length = shape
    random = torch.Generator().manual_seed(length)
    store = torch.randn(2, kv_heads, batch * 300, channels, generator=random).to(dtype)
    keys, values = store.unflatten(2, (batch, 300)).transpose(1, 2)[..., :length, :]
    qkv = torch.randn(batch, kv_heads * (groups + 2), channels, generator=random).to(dtype)
    lengths = torch.randint(1, length + 1, (batch,), generator=random)
    lengths[0] = length
    hidden = torch.arange(length) >= lengths[:, None]
    mask = torch.zeros(batch, length, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return qkv[:, : kv_heads * groups] * 3, keys, values, lengths - 1, mask[:, None, None, :]


def exact(q, keys, values, mask):
    groups = q.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(groups, 1) for x in (keys, values))
    scores = (keys @ q.double().unsqueeze(-1)).squeeze(-1) / q.shape[2] ** 0.5
    weights = torch.softmax(scores + mask.squeeze(1), -1)
    return (weights.unsqueeze(-2) @ values).squeeze(-2)


@pytest.mark.parametrize("path", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_attention_is_that_of_float64(shape, dtype, path, monkeypatch):
    q, keys, values, positions, mask = case(shape, dtype)
    if path == "torch":
        monkeypatch.setattr(attention.native, "can_attend", lambda *_: False)
    elif not native.can_attend(q, keys):
        pytest.skip("no C compiler at installation")
    found = decode_attention(q, keys, values, positions, lambda: mask)
    assert found.dtype == dtype
    wanted = exact(q, keys, values, mask)
    # float32: a few roundings of the sums; bfloat16: one rounding of the output, two by torch.
    tolerance = 3e-6 if dtype == torch.float32 else 2**-8
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def windowed(mask, positions, window):
    """The mask with what lies before each query's window hidden too."""
    places = torch.arange(mask.shape[-1])
    is_old = places <= (positions - window)[:, None]
    return mask.masked_fill(is_old[:, None, None, :], -torch.inf)


@pytest.mark.parametrize("path", ["native", "torch"])
@pytest.mark.parametrize("window", [1, 7, 64, 129, 300])
def test_window_leaves_each_query_the_last_positions(window, path, monkeypatch):
    """Of sequences of unequal length, some of them shorter than the window."""
    q, keys, values, positions, mask = case((3, 2, 4, 16, 130), torch.float32)
    positions = torch.tensor([129, 5, 64])
    hidden = torch.arange(130) > positions[:, None]
    mask = windowed(torch.zeros_like(mask).masked_fill(hidden[:, None, None, :], -torch.inf),
                    positions, window)  # fmt: skip
    if path == "torch":
        monkeypatch.setattr(attention.native, "can_attend", lambda *_: False)
    elif not native.can_attend(q, keys):
        pytest.skip("no C compiler at installation")
    found = decode_attention(q, keys, values, positions, lambda: mask, window)
    wanted = exact(q, keys, values, mask)
    assert (found - wanted).norm() <= 3e-6 * wanted.norm()  # a few roundings of the sums


@pytest.mark.skipif(not is_available(), reason="no C compiler at installation")
def test_nan_before_the_window_is_not_read():
    q, keys, values, positions, _ = case((2, 1, 8, 128, 200), torch.float32)
    keys[0, 0, :100] = values[0, 0, :100] = torch.nan
    found = decode_attention(q, keys, values, positions, lambda: None, 100)
    assert positions[0] == 199
    assert found[0].isfinite().all()
    assert decode_attention(q, keys, values, positions, lambda: None, 101)[0].isnan().all()


@pytest.mark.skipif(not is_available(), reason="no C compiler at installation")
def test_head_is_the_same_whatever_other_heads_and_sequences_there_are():
    """So a rank's heads give the bits that they give on one rank."""
    q, keys, values, positions, mask = case((3, 2, 4, 16, 130), torch.float32)
    whole = decode_attention(q, keys, values, positions, lambda: mask)
    alone = decode_attention(
        q[1:2, 4:], keys[1:2, 1:], values[1:2, 1:], positions[1:2], lambda: None
    )
    assert torch.equal(alone, whole[1:2, 4:])


@pytest.mark.skipif(not is_available(), reason="no C compiler at installation")
def test_nan_in_a_key_is_not_hidden():
    q, keys, values, positions, mask = case((2, 1, 8, 128, 200), torch.float32)
    keys[0, 0, 3, 5] = torch.nan
    found = decode_attention(q, keys, values, positions, lambda: mask)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()
