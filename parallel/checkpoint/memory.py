"""What a rank's weights take in memory, where they are joined and packed, and what a step reads of them.

Needs no torch. It is what `load_decoder` counts when they are there (`LoadTimings.weight_bytes`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from parallel.checkpoint.layout import Layout
from parallel.checkpoint.source import DTYPE_BYTES
from parallel.model.parameters import Parameter
from parallel.model.placements import EMBEDDING, HEAD
from parallel.placement import Split, index_shape
from quant.packing import Packing


@dataclass(frozen=True)
class Memory:
    """The weights of a layout in memory.

    Attributes:
        dtype: the compute dtype, which all floats but scales have.
        packing: of the quantized weights.
    """

    layout: Layout
    dtype: str
    packing: Packing = Packing()

    def weight_bytes(self, rank: int, tp: int) -> int:
        """All that a rank holds."""
        return sum(self.bytes_by_kind(rank, tp))

    def bytes_by_kind(self, rank: int, tp: int) -> tuple[int, int, int]:
        """Of the linears; of the embedding and lm_head; of all others."""
        linear = embedding = other = 0
        for parameter, count in self.layout.parameter_kinds:
            num_bytes = count * self._num_bytes(parameter, rank, tp)
            if parameter.name in (EMBEDDING, HEAD):
                embedding += num_bytes
            elif parameter.is_product:
                linear += num_bytes
            else:
                other += num_bytes
        return linear, embedding, other

    def read_bytes(self, rank: int, tp: int) -> int:
        """What a step reads: all but the embedding, of which it takes the rows of its tokens.

        A tied embedding is read as lm_head, each rank its part.
        """
        row, *_ = self.layout.parts[EMBEDDING]
        embedding, head = row.num_bytes(rank, tp, self.dtype), 0
        if HEAD not in self.layout.table:
            shape = index_shape(Split(0).index(row.shape, rank, tp))
            head = math.prod(shape) * DTYPE_BYTES[self.dtype]
        return self.weight_bytes(rank, tp) - embedding + head

    def _num_bytes(self, parameter: Parameter, rank: int, tp: int) -> int:
        parts = [part for row in parameter.rows for part in self.layout.parts[row.name]]
        scheme = self.layout.schemes.get(parameter.rows[0].name)
        if scheme is None:
            return sum(part.num_bytes(rank, tp, self.dtype) for part in parts)
        indices = [row.index(rank, tp) for row in parameter.rows]
        columns = indices[0][1]
        shape = sum(index_shape(index)[0] for index in indices), columns.stop - columns.start
        first_column = columns.start % scheme.group_size if scheme.group_size else 0
        scale_bytes = DTYPE_BYTES[parts[1].dtype]
        return self.packing.num_bytes(scheme, shape, first_column, scale_bytes)
