"""Round to nearest: each weight by itself, no calibration data."""

from __future__ import annotations

from torch import Tensor

from quant.numeric import quantize_per_channel
from quant.scheme import QuantScheme
from quant.weight import QuantizedWeight


def round_to_nearest(weight_NK: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Quantize one linear's weight.

    Args:
        weight_NK: [out_features, in_features], whole rows.
        scheme: must quantize weights to int8 per channel.

    Raises:
        ValueError: the weight holds an infinity or a NaN.
    """
    assert scheme.weight_dtype == "int8", scheme
    values_NK, scale_N = quantize_per_channel(weight_NK)
    return QuantizedWeight(values_NK, scale_N, scheme.activation_dtype)
