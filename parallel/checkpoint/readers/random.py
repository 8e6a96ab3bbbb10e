"""Random weights of a shape that has no files: for measuring speed and memory.

The values repeat: one block of random numbers is drawn from the seed, and each row of a tensor is a
window of it, whose place follows from the tensor's name and the row's number alone. So any slice
can be read by itself, is the same at every tensor-parallel size, and costs no more than a copy. Text
made with such weights means nothing; the logits are finite.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.layout import INPUT_SCALE, SCALE_SUFFIX, Layout
from parallel.checkpoint.source import TensorInfo
from parallel.model.placements import KV_SCALES
from parallel.placement import Index

if TYPE_CHECKING:
    from torch import Tensor

# Two primes: windows of neighbouring rows lie apart, and few rows share one.
_PERIOD = 1_048_573
_ROW_STRIDE = 4_099
# The largest input that static activations hold: inputs have a deviation of 1, or less.
_INPUT_RANGE = 4.0
# The standard deviation of integers drawn evenly from -127 to 127, and from -8 to 7.
_DEVIATIONS = {"int8": math.sqrt((255**2 - 1) / 12), "int4": math.sqrt((16**2 - 1) / 12)}

# Keys and values have a deviation near 1, as the normed stream; larger ones than so many saturate.
_KV_DEVIATIONS = 6.0


class RandomSource:
    """A source of a layout's tensors, quantized already where the layout quantizes.

    Norms are ones. Other values are drawn evenly, with a standard deviation of 1 / sqrt(in_features),
    so that activations keep their size from layer to layer.

    Args:
        layout: the tensors that it offers.
        seed: fixes every value.
    """

    def __init__(self, layout: Layout, seed: int) -> None:
        self.path = Path("random weights")
        self.scheme = layout.scheme
        self.seed = seed
        self._fan_in = {item.name: item.row.shape[-1] for item in layout.tensors}
        self._dtypes = {name: scheme.weight_dtype for name, scheme in layout.schemes.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            item.name: TensorInfo(item.shape, item.dtype, "") for item in layout.tensors
        }

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of a tensor, contiguous, in the layout's dtype."""
        import torch

        shape = [cut.stop - cut.start for cut in index]
        dtype = getattr(torch, self.tensors[name].dtype)
        if name.endswith(f".{INPUT_SCALE}"):
            return torch.full(shape, _INPUT_RANGE / 127, dtype=dtype)
        if name.endswith(KV_SCALES):
            return torch.full(shape, _KV_DEVIATIONS / 127, dtype=dtype)
        if name.endswith(SCALE_SUFFIX):
            deviation = _DEVIATIONS[self._dtypes[name.removesuffix(SCALE_SUFFIX)]]
            return torch.full(shape, self._deviation(name) / deviation, dtype=dtype)
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype)
        out = torch.empty(shape, dtype=dtype)
        rows, columns = index if len(index) == 2 else (slice(0, 1), *index)
        if not dtype.is_floating_point:  # two values of int4 are a byte like any other
            self._fill(out.view(torch.int8), name, rows.start, columns.start)
            return out
        self._fill(out.view(-1, shape[-1]), name, rows.start, columns.start)
        return out.mul_(self._deviation(name))

    def identity(self) -> dict[str, Any]:
        return {"random": self.seed}

    def _deviation(self, name: str) -> float:
        return 1 / math.sqrt(self._fan_in[name])

    def _fill(self, out_NK: Tensor, name: str, first_row: int, first_column: int) -> None:
        """Copy windows row by row; those up to the end of the block are one strided view of it."""
        num_rows, num_columns = out_NK.shape
        assert first_column + num_columns <= _PERIOD, name
        block = _block(self.seed, out_NK.is_floating_point())
        done = 0
        while done < num_rows:
            place = (_place(self.seed, name) + (first_row + done) * _ROW_STRIDE) % _PERIOD
            count = min(num_rows - done, -(-(_PERIOD - place) // _ROW_STRIDE))
            window = (count, num_columns), (_ROW_STRIDE, 1), place + first_column
            out_NK[done : done + count] = block.as_strided(*window)
            done += count


@cache
def _place(seed: int, name: str) -> int:
    """Where in the block a tensor's first row begins."""
    return _hash(seed, name) % _PERIOD


def _hash(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@cache
def _block(seed: int, is_floating: bool) -> Tensor:
    """The block twice over, so that a window may run past its end: int8, or float32 of deviation 1."""
    import torch

    generator = torch.Generator().manual_seed(_hash(seed, "block"))
    if is_floating:
        values = torch.rand(_PERIOD, generator=generator).sub_(0.5).mul_(math.sqrt(12))
    else:
        values = torch.randint(-127, 128, (_PERIOD,), generator=generator, dtype=torch.int8)
    return values.repeat(2)
