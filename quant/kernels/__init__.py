"""The products of activations with weights, one file a path.

A kernel packs a weight once into its own layout; the packed weight then multiplies. What a kernel
has no product for takes the reference path (`quant.packing.has_product`).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from quant.kernels.native import NativeKernel
from quant.kernels.reference import ReferenceKernel
from quant.packing import has_product
from quant.weight import (
    PackedWeight,
    QuantizedWeight,
    ReadyWeight,
    StoredWeight,
    fuse,
    unpacked,
)


class Kernel(Protocol):
    """A path for products with weights, chosen once for a job.

    Attributes:
        name: what the user chooses it by.
    """

    name: str

    def pack(self, weight: QuantizedWeight) -> PackedWeight:
        """The weight in this path's layout; safe to call from several threads at once."""
        ...


def make_ready(kernel: Kernel, *parts: StoredWeight | Tensor) -> ReadyWeight:
    """Weights of one input, such as q, k and v, as one product takes them: packed if quantized.

    C packs each part from where it lies; other paths are given all of them joined.
    """
    quantized = [part for part in parts if not isinstance(part, Tensor)]
    if isinstance(kernel, NativeKernel) and len(quantized) == len(parts):
        return kernel.pack_parts(quantized)
    weight = fuse([part if isinstance(part, Tensor) else unpacked(part) for part in parts])
    if not isinstance(weight, QuantizedWeight):
        return weight
    own = has_product(kernel.name, weight.scheme)
    return (kernel if own else ReferenceKernel()).pack(weight)
