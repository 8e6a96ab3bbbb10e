"""Round to nearest: each weight by itself, no calibration data."""

from __future__ import annotations

from torch import Tensor

from quant.numeric import Grid
from quant.rounding import quantize
from quant.scheme import LinearScheme
from quant.weight import QuantizedWeight


def round_to_nearest(weight_NK: Tensor, scheme: LinearScheme) -> QuantizedWeight:
    """Quantize one linear's weight.

    Args:
        weight_NK: [out_features, in_features], whole rows.

    Raises:
        ValueError: the weight holds an infinity or a NaN.
    """
    values_NK, scale_NG = quantize(weight_NK, Grid(scheme.bits, scheme.group_size))
    return QuantizedWeight(
        values_NK, scale_NG, scheme.activation_dtype, scheme.bits, scheme.group_size
    )
