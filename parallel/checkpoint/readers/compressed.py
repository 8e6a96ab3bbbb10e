"""A compressed-tensors directory as a source: its integers and scales as `prepare` would store them.

Packed words become int8, or two values of int4 a byte, as they are read; a slice reads its own words
only. Names, dtypes and shapes are checked against config.json when the directory is opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.compressed_config import PACKED, CompressedLinear
from parallel.checkpoint.compressed_groups import to_scheme
from parallel.checkpoint.layout import SCALE_SUFFIX, STORED_DTYPES
from parallel.checkpoint.readers.huggingface import HuggingFaceSource
from parallel.checkpoint.source import FLOAT_DTYPES, TensorInfo
from parallel.errors import CheckpointError
from parallel.placement import Index, Shape

if TYPE_CHECKING:
    from torch import Tensor

# Parts of a linear that stand for what is not read, and what that is.
_UNREAD = {
    ".weight_zero_point": "zero points of asymmetric weights",
    ".weight_g_idx": "columns in another order (g_idx)",
    ".weight_global_scale": "scales of 4-bit floats",
    ".input_scale": "static scales of activations",
    ".input_zero_point": "static zero points of activations",
    ".k_scale": "scales of a KV cache",
    ".v_scale": "scales of a KV cache",
    ".bitmask": "sparse weights",
    ".compressed": "sparse weights",
}


class CompressedSource:
    """The tensors of a directory that llm-compressor, or `export`, wrote.

    Args:
        linears: how each linear module is held, by config.json.
        shapes: of the weight of each, by config.json.

    Attributes:
        scheme: what `quant.*` would say of it.
        quantized: the names of the values and scales in `tensors`.

    Raises:
        CheckpointError: a part of a linear is missing, or of another dtype or shape; or there are
            parts that are not read.
    """

    def __init__(
        self,
        path: Path,
        linears: Mapping[str, CompressedLinear | None],
        shapes: Mapping[str, Shape],
    ) -> None:
        self.path = path
        self.scheme = to_scheme(linears)
        self._files = HuggingFaceSource(path)
        self._shapes = shapes
        self._held = {f"{name}.weight": linear for name, linear in linears.items() if linear}
        self._check_unread()
        parts: set[str] = set()
        stored: dict[str, TensorInfo] = {}
        for name, linear in self._held.items():
            self._check_parts(name, linear)
            parts |= set(part_names(name, linear))
            stored |= self._stored(name, linear)
        self._check_shapes()
        self.quantized = frozenset(stored)
        plain = {name: info for name, info in self._files.tensors.items() if name not in parts}
        self.tensors: Mapping[str, TensorInfo] = {**plain, **stored}

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of what `tensors` says, in its dtype."""
        linear = self._held.get(name)
        if linear is None or (linear.format != PACKED and linear.scheme.bits == 8):
            return self._files.read(name, index)
        if linear.format == PACKED:
            return self._read_words(name, linear, index)
        return self._read_small_integers(name, index)

    def identity(self) -> dict[str, Any]:
        return self._files.identity()

    def _read_words(self, name: str, linear: CompressedLinear, index: Index) -> Tensor:
        from parallel.checkpoint.compressed_words import from_words, words_of

        rows, columns = index
        words = self._files.read(f"{name}_packed", (rows, words_of(columns.start, columns.stop)))
        num_columns = self._shapes[_module(name)][1]
        return from_words(words, columns.start, columns.stop, linear.scheme.bits, num_columns)

    def _read_small_integers(self, name: str, index: Index) -> Tensor:
        """int4 that lies one value a byte, as it does beside int8 activations."""
        from quant.numeric import pack_int4

        rows, columns = index
        last = min(2 * columns.stop, self._shapes[_module(name)][1])
        values = self._files.read(name, (rows, slice(2 * columns.start, last)))
        if values.numel() and not -8 <= int(values.min()) <= int(values.max()) <= 7:
            raise CheckpointError(
                f"{self.path}: {name} must hold integers of 4 bits (-8 to 7) by config.json, but "
                f"holds {int(values.min())} to {int(values.max())}; download it again."
            )
        return pack_int4(values)

    def _stored(self, name: str, linear: CompressedLinear) -> dict[str, TensorInfo]:
        rows, columns = self._shapes[_module(name)]
        num_bytes = -(-columns // linear.scheme.values_per_byte)
        file = self._files.tensors[part_names(name, linear)[0]].file
        values = TensorInfo((rows, num_bytes), STORED_DTYPES[linear.scheme.weight_dtype], file)
        return {name: values, name + SCALE_SUFFIX: self._files.tensors[name + SCALE_SUFFIX]}

    def _check_unread(self) -> None:
        for name in self._files.tensors:
            for suffix, what in _UNREAD.items():
                if name.endswith(suffix):
                    raise CheckpointError(
                        f"{self.path}: {name} holds {what}, which are not read; give the "
                        "unquantized checkpoint and quantize it with quant=rtn_a16w8."
                    )

    def _check_parts(self, name: str, linear: CompressedLinear) -> None:
        for part, dtypes, shape in _parts(name, linear, self._shapes[_module(name)]):
            info = self._files.tensors.get(part)
            if info is None:
                raise CheckpointError(
                    f"{self.path} lacks {part}, which config.json makes a part of it "
                    f"({linear.format}); download the checkpoint again, or use its own config.json."
                )
            if info.dtype not in dtypes or info.shape != shape:
                raise CheckpointError(
                    f"{self.path}: {part} must be {' or '.join(dtypes)} {list(shape)} by "
                    f"config.json, but is {info.dtype} {list(info.shape)}; use the config.json of "
                    "this checkpoint."
                )

    def _check_shapes(self) -> None:
        """Words alone do not say how many columns they hold."""
        packed = [name for name, linear in self._held.items() if linear.format == PACKED]
        said = self._files.numbers(f"{name}_shape" for name in packed)
        for name in packed:
            found, wanted = said[f"{name}_shape"], list(self._shapes[_module(name)])
            if found != wanted:
                raise CheckpointError(
                    f"{self.path}: {name}_shape must be {wanted} by config.json, but is {found}; use "
                    "the config.json of this checkpoint."
                )


def part_names(name: str, linear: CompressedLinear) -> tuple[str, ...]:
    """The tensors that stand for a weight in the files, its values first."""
    if linear.format == PACKED:
        return f"{name}_packed", name + SCALE_SUFFIX, f"{name}_shape"
    return name, name + SCALE_SUFFIX


def _parts(
    name: str, linear: CompressedLinear, shape: Shape
) -> Iterator[tuple[str, tuple[str, ...], Shape]]:
    """Each part with the dtypes it may have and its shape."""
    rows, columns = shape
    num_groups = -(-columns // (linear.scheme.group_size or columns))
    yield name + SCALE_SUFFIX, FLOAT_DTYPES, (rows, num_groups)
    if linear.format == PACKED:
        yield f"{name}_packed", ("int32",), (rows, -(-columns * linear.scheme.bits // 32))
        yield f"{name}_shape", ("int64", "int32"), (2,)
    else:
        yield name, ("int8",), shape


def _module(name: str) -> str:
    return name.rpartition(".")[0]
