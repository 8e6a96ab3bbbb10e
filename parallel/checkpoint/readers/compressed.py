"""A compressed-tensors directory as a source: its integers and scales as `prepare` would store them.

Packed words become int8, or two values of int4 a byte, as they are read; a slice reads its own words
only. Names, dtypes and shapes are checked against config.json when the directory is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.compressed.config import PACKED, CompressedLinear
from parallel.checkpoint.compressed.groups import to_scheme
from parallel.checkpoint.compressed.parts import (
    UNREAD,
    input_scale_of,
    module_of,
    part_names,
    parts_of,
    zero_point_of,
)
from parallel.checkpoint.layout import (
    INPUT_SCALE,
    INPUT_ZERO_POINT,
    SCALE_SUFFIX,
    STORED_DTYPES,
)
from parallel.checkpoint.readers.huggingface import HuggingFaceSource
from parallel.checkpoint.source import TensorInfo
from parallel.errors import CheckpointError
from parallel.placement import Index, Shape

if TYPE_CHECKING:
    from torch import Tensor

_REMEDY = "give the unquantized checkpoint and quantize it with quant=rtn_a16w8."


class CompressedSource:
    """The tensors of a directory that llm-compressor, or `export`, wrote.

    Args:
        linears: how each linear module is held, by config.json.
        shapes: of the weight of each, by config.json.
        is_tied: whether lm_head is the embedding, by config.json.

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
        *,
        is_tied: bool = False,
    ) -> None:
        self.path = path
        self.scheme = to_scheme(linears)
        self._files = HuggingFaceSource(path, is_tied=is_tied)
        self._shapes = shapes
        self._held = {f"{name}.weight": linear for name, linear in linears.items() if linear}
        self._check_unread()
        parts: set[str] = set()
        stored: dict[str, TensorInfo] = {}
        for name, linear in self._held.items():
            self._check_parts(name, linear)
            parts |= set(part_names(name, linear, self._files.tensors))
            stored |= self._stored(name, linear)
        self._check_shapes()
        self._check_zero_points()
        self.quantized = frozenset(stored)
        plain = {name: info for name, info in self._files.tensors.items() if name not in parts}
        self.tensors: Mapping[str, TensorInfo] = {**plain, **stored}

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of what `tensors` says, in its dtype."""
        if name in self.quantized and name.endswith(INPUT_SCALE):
            return self._read_number(name).float()
        if name in self.quantized and name.endswith(INPUT_ZERO_POINT):
            return self._read_number(name).char()
        linear = self._held.get(name)
        if linear is None or (linear.format != PACKED and linear.scheme.bits == 8):
            return self._files.read(name, index)
        if linear.format == PACKED:
            return self._read_words(name, linear, index)
        return self._read_small_integers(name, index)

    def identity(self) -> dict[str, Any]:
        return self._files.identity()

    def _read_number(self, name: str) -> Tensor:
        """[1]; it may be a scalar in the file."""
        whole = tuple(slice(0, length) for length in self._files.tensors[name].shape)
        return self._files.read(name, whole).view(1)

    def _read_words(self, name: str, linear: CompressedLinear, index: Index) -> Tensor:
        from parallel.checkpoint.compressed.words import from_words, words_of

        rows, columns = index
        words = self._files.read(f"{name}_packed", (rows, words_of(columns.start, columns.stop)))
        num_columns = self._shapes[module_of(name)][1]
        return from_words(words, columns.start, columns.stop, linear.scheme.bits, num_columns)

    def _read_small_integers(self, name: str, index: Index) -> Tensor:
        """int4 that lies one value a byte, as it does beside int8 activations."""
        from quant.numeric import pack_int4

        rows, columns = index
        last = min(2 * columns.stop, self._shapes[module_of(name)][1])
        values = self._files.read(name, (rows, slice(2 * columns.start, last)))
        if values.numel() and not -8 <= int(values.min()) <= int(values.max()) <= 7:
            raise CheckpointError(
                f"{self.path}: {name} must hold integers of 4 bits (-8 to 7) by config.json, but "
                f"holds {int(values.min())} to {int(values.max())}; download it again."
            )
        return pack_int4(values)

    def _stored(self, name: str, linear: CompressedLinear) -> dict[str, TensorInfo]:
        rows, columns = self._shapes[module_of(name)]
        num_bytes = -(-columns // linear.scheme.values_per_byte)
        held = self._files.tensors
        file = held[part_names(name, linear, held)[0]].file
        values = TensorInfo((rows, num_bytes), STORED_DTYPES[linear.scheme.weight_dtype], file)
        stored = {name: values, name + SCALE_SUFFIX: held[name + SCALE_SUFFIX]}
        if linear.scheme.is_static:
            scale = input_scale_of(name)
            stored[scale] = TensorInfo((1,), "float32", held[scale].file)
        if linear.is_asymmetric:
            zero_point = zero_point_of(name)
            stored[zero_point] = TensorInfo((1,), "int8", held[zero_point].file)
        return stored

    def _check_unread(self) -> None:
        for name in self._files.tensors:
            for suffix, what in UNREAD.items():
                if name.endswith(suffix):
                    raise CheckpointError(
                        f"{self.path}: {name} holds {what}, which are not read; {_REMEDY}"
                    )

    def _check_parts(self, name: str, linear: CompressedLinear) -> None:
        held = self._files.tensors
        for part, dtypes, shapes in parts_of(name, linear, self._shapes[module_of(name)], held):
            info = held.get(part)
            if info is None:
                raise CheckpointError(
                    f"{self.path} lacks {part}, which config.json makes a part of it "
                    f"({linear.format}); download the checkpoint again, or use its own config.json."
                )
            if info.dtype not in dtypes or info.shape not in shapes:
                raise CheckpointError(
                    f"{self.path}: {part} must be {' or '.join(dtypes)} {list(shapes[0])} by "
                    f"config.json, but is {info.dtype} {list(info.shape)}; use the config.json of "
                    "this checkpoint."
                )

    def _check_shapes(self) -> None:
        """Words alone do not say how many columns they hold."""
        packed = [name for name, linear in self._held.items() if linear.format == PACKED]
        said = self._files.numbers(f"{name}_shape" for name in packed)
        for name in packed:
            found, wanted = said[f"{name}_shape"], list(self._shapes[module_of(name)])
            if found != wanted:
                raise CheckpointError(
                    f"{self.path}: {name}_shape must be {wanted} by config.json, but is {found}; use "
                    "the config.json of this checkpoint."
                )

    def _check_zero_points(self) -> None:
        """Early releases wrote those of symmetric activations too."""
        linears = {
            zero_point: linear
            for name, linear in self._held.items()
            if (zero_point := zero_point_of(name)) in part_names(name, linear, self._files.tensors)
        }
        for name, (number,) in self._files.numbers(linears).items():
            if not linears[name].is_asymmetric and number != 0:
                raise CheckpointError(
                    f"{self.path}: {name} must be 0, as activations of symmetric integers have no "
                    f"other, but is {number}; {_REMEDY}"
                )
            if not -128 <= number <= 127:
                raise CheckpointError(
                    f"{self.path}: {name} must be an integer of 8 bits (-128 to 127), but is {number}; "
                    "download it again."
                )
