"""How many bytes a kernel's weights take, by their shapes. Needs no torch.

The kernels lay their weights out by the same functions, so that what is planned is what is held.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from quant.scheme import LinearScheme

# Of the C kernels: output channels that lie side by side, columns that one instruction multiplies where
# it multiplies bytes, and columns of int4 whose nibbles lie in four bytes.
BLOCK, PAIR, QUAD, EIGHT = 32, 2, 4, 8
_SCALE_BYTES = 4  # of a channel: float32


@dataclass(frozen=True)
class Packing:
    """What packs the quantized weights of a job.

    Attributes:
        kernel: native, onednn or reference.
        takes_quads: whether C multiplies int8 activations four bytes at a time here, for which the sums
            of the weights lie behind them: where one instruction does it, and in the portable set.
    """

    kernel: str = "native"
    takes_quads: bool = False

    def num_bytes(
        self, scheme: LinearScheme, shape: tuple[int, int], first_column: int, scale_bytes: int
    ) -> int:
        """Of one product's weight with its scales, as `PackedWeight.nbytes` says it.

        Args:
            shape: its output channels, of all parts that are joined, and its columns.
            first_column: the place of column 0 within its group.
            scale_bytes: of a scale as it is stored.
        """
        out_features, in_features = shape
        num_groups = 1
        if scheme.group_size is None:
            scale_bytes = _SCALE_BYTES
        else:
            num_groups = -(-(first_column + in_features) // scheme.group_size)
        if self.kernel != "native":  # the others, and what they leave to the reference
            return out_features * (
                -(-in_features // scheme.values_per_byte) + scale_bytes * num_groups
            )
        if scheme.bits == 8 and scheme.group_size is None:
            takes_quads = self.takes_quads and scheme.activation_dtype is not None
            packed = int8_shape(out_features, in_features, QUAD if takes_quads else PAIR)
        else:
            packed = grouped_shape(out_features, first_column % EIGHT + in_features, scheme.bits)
        num_rows = packed[0] * BLOCK if scheme.group_size else out_features
        return math.prod(packed) + scale_bytes * num_groups * num_rows


def has_product(kernel: str, scheme: LinearScheme) -> bool:
    """Whether a kernel multiplies weights of a scheme itself, or leaves them to the reference.

    `native` multiplies them all, wherever in a group a rank's part begins; `onednn` has int8 weights
    with one scale a channel.
    """
    if kernel in ("native", "reference"):
        return True
    return scheme.weight_dtype == "int8" and scheme.group_size is None


def int8_shape(out_features: int, in_features: int, width: int) -> tuple[int, ...]:
    """Of int8 weights with one scale a channel in C, in bytes: [blocks, words, BLOCK, width].

    Behind the words of quads lies one more, the sum of each channel.
    """
    num_words = -(-in_features // width) + (width == QUAD)
    return -(-out_features // BLOCK), num_words, BLOCK, width


def grouped_shape(out_features: int, num_columns: int, bits: int) -> tuple[int, ...]:
    """Of int4 weights, and of groups, in C, in bytes: [blocks, eights of columns, BLOCK, bits]."""
    return -(-out_features // BLOCK), -(-num_columns // EIGHT), BLOCK, bits
