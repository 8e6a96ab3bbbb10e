"""Integer partial sums: the logits of a quantized model do not depend on the number of ranks."""

from __future__ import annotations

import pytest
import torch

from launcher.resolve import DEMO
from quant.scheme import QuantScheme
from tests.models import logits


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
@pytest.mark.parametrize(
    ("activation_dtype", "exact_sums"), [("int8", None), (None, True)], ids=["a8", "a16"]
)
def test_exact_sums_give_the_same_bits_at_every_size(
    size, weight_dtype, activation_dtype, exact_sums
):
    """No other engine offers it: the logits of 8 ranks are those of one, bit for bit."""
    scheme = QuantScheme(
        quant_method="rtn",
        weight_dtype=weight_dtype,
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


@pytest.mark.parametrize("size", [2, 4])
def test_int8_activations_of_grouped_weights_are_scaled_by_the_whole_row(size):
    """Their sums are float32, whose last bits may tip an activation; a scale of each part would
    change every one of them, as it does where exact sums are switched off."""
    scheme = QuantScheme(
        quant_method="rtn",
        weight_dtype="int4",
        weight_quant_granularity="per_group",
        group_size=32,
        activation_dtype="int8",
    )
    ids = [1, *range(40, 60)]
    alone = logits(DEMO, ids, 1, scheme=scheme)
    found, apart = (logits(DEMO, ids, size, scheme=scheme, exact_sums=how) for how in (None, False))
    # 0.0 and 0.02 were seen; a tipped activation or two is below a tenth of the latter.
    assert (found - alone).norm() <= 2e-3 * alone.norm()
    assert (apart - alone).norm() >= 1e-2 * alone.norm()
