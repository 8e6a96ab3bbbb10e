"""The C library: products with int8 weights (int8.c says how they are exact on every processor), with
int4 and grouped ones (int4.c) and with bfloat16 ones, decode attention, and what lies between the
products of a layer.

The library is compiled when the package is installed, where there is a C compiler; without it this
path is absent and the others do the work.
"""

from __future__ import annotations

from collections.abc import Sequence

from quant.kernels.native.calls import instruction_sets
from quant.kernels.native.int4 import GroupedNativeWeight
from quant.kernels.native.int8 import Int8NativeWeight
from quant.weight import PackedWeight, QuantizedWeight, StoredWeight, check_alike, form_of, unpacked


class NativeKernel:
    """The C path.

    Args:
        instruction_set: one of `instruction_sets()`; None takes the widest.

    Raises:
        OSError: the library is not there, or cannot be loaded.
    """

    name = "native"

    def __init__(self, instruction_set: str | None = None) -> None:
        known = instruction_sets()
        self.instruction_set = instruction_set or list(known)[-1]
        self.set_index = known[self.instruction_set]

    def pack(self, weight: QuantizedWeight) -> PackedWeight:
        return self.pack_parts([weight])

    def pack_parts(self, parts: Sequence[StoredWeight]) -> PackedWeight:
        """Weights of one input as one, packed from where they lie: they are never joined before."""
        forms = [form_of(part) for part in parts]
        check_alike(forms)
        if forms[0].bits == 8 and forms[0].group_size is None:
            return Int8NativeWeight([unpacked(part) for part in parts], self.set_index)
        return GroupedNativeWeight(parts, self.set_index)
