"""Integer partial sums: the logits of a quantized model do not depend on the number of ranks."""

from __future__ import annotations

import pytest
import torch

from launcher.resolve import DEMO
from quant.scheme import QuantScheme
from tests.models import logits


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(
    ("activation_dtype", "exact_sums"), [("int8", None), (None, True)], ids=["w8a8", "w8a16"]
)
def test_exact_sums_give_the_same_bits_at_every_size(size, activation_dtype, exact_sums):
    """No other engine offers it: the logits of 8 ranks are those of one, bit for bit."""
    scheme = QuantScheme(
        quant_method="rtn",
        weight_dtype="int8",
        activation_dtype=activation_dtype,
        modules_to_not_convert=(),
    )
    ids = [1, *((37 * place) % 500 for place in range(1, 40))]
    how = {"scheme": scheme, "dtype": torch.bfloat16, "exact_sums": exact_sums}
    assert torch.equal(logits(DEMO, ids, size, **how), logits(DEMO, ids, 1, **how))


@pytest.mark.parametrize("size", [2, 4])
def test_float32_logits_differ_by_the_rounding_of_lm_head_alone(size):
    """It is not quantized by default, and torch's float32 product of fewer rows rounds otherwise."""
    scheme = QuantScheme(quant_method="rtn", weight_dtype="int8", activation_dtype="int8")
    ids = [1, *range(40, 60)]
    found, wanted = (logits(DEMO, ids, tp, scheme=scheme) for tp in (size, 1))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_int8_activations_without_exact_sums_differ_between_sizes():
    """Why they are the default there: each rank would scale its part of a row by itself."""
    scheme = QuantScheme(quant_method="rtn", weight_dtype="int8", activation_dtype="int8")
    ids = [1, *range(40, 60)]
    how = {"scheme": scheme, "exact_sums": False}
    assert not torch.allclose(logits(DEMO, ids, 2, **how), logits(DEMO, ids, 1, **how), atol=1e-2)
