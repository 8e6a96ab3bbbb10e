"""The products of activations with weights, one file a path.

A kernel packs a weight once into its own layout; the packed weight then multiplies.
"""

from __future__ import annotations

from typing import Protocol

from quant.weight import PackedWeight, QuantizedWeight, ReadyWeight, Weight


class Kernel(Protocol):
    """A path for products with weights, chosen once for a job.

    Attributes:
        name: what the user chooses it by.
    """

    name: str

    def pack(self, weight: QuantizedWeight) -> PackedWeight:
        """The weight in this path's layout; safe to call from several threads at once."""
        ...


def make_ready(kernel: Kernel, weight: Weight) -> ReadyWeight:
    """A weight as a product takes it: packed if it is quantized, else as it is."""
    return kernel.pack(weight) if isinstance(weight, QuantizedWeight) else weight
