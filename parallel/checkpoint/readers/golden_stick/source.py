"""Golden Stick's quantized files as a source: its integers and scales as `prepare` would store them.

The files say nothing of their scheme: it comes from the YAML beside them, and names, dtypes and
shapes are checked against it when the directory is opened. Values that would change the arithmetic
(zero points of a weight that are not zero, a smoothing of the input) are looked at when their linear is
read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.layout import INPUT_SCALE as INPUT_SCALE_NAME
from parallel.checkpoint.layout import INPUT_ZERO_POINT, SCALE_SUFFIX, STORED_DTYPES
from parallel.checkpoint.mindformers.directory import ModelFile
from parallel.checkpoint.readers.golden_stick.finder import find_parts
from parallel.checkpoint.readers.golden_stick.names import (
    KEY_SCALE,
    SCALE,
    VALUE_SCALE,
    WEIGHT,
    is_quantized_name,
)
from parallel.checkpoint.readers.golden_stick.parts import LinearParts, Parts
from parallel.checkpoint.readers.mindformers.files import open_ranks
from parallel.checkpoint.source import TensorFile, TensorInfo
from parallel.errors import CheckpointError
from parallel.model.config import ModelConfig
from parallel.model.placements import HEAD, linear_modules, placement_table
from parallel.placement import Index
from quant.errors import QuantError
from quant.scheme import LinearScheme, QuantScheme

if TYPE_CHECKING:
    from torch import Tensor


def check_unquantized(path: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError for parts of Golden Stick's in a directory that says no scheme."""
    for name in names:
        if is_quantized_name(name):
            raise CheckpointError(
                f"{path} holds {name}, a part of weights that Golden Stick has quantized, but no YAML "
                "in it says a quantization_config; put the YAML that it was quantized with beside it, "
                "or give it as config=YAML."
            )


class GoldenStickSource:
    """Whole files, or those that each rank of theirs saved.

    Args:
        model_file: the YAML beside them, which says the scheme.

    Attributes:
        scheme: what `quant.*` would say of it.
        said_by: the file that says so.
        quantized: the names of the values and scales in `tensors`.

    Raises:
        CheckpointError: the files are not what the scheme says, or hold what cannot be computed.
    """

    def __init__(self, path: Path, config: ModelConfig, model_file: ModelFile) -> None:
        assert model_file.scheme is not None, "who says no scheme is no source of this kind"
        self.path = path
        self.scheme: QuantScheme = model_file.scheme
        self.said_by = model_file.path.name
        self._ranks = open_ranks(path)
        schemes = _linear_schemes(self.scheme, config, model_file.path)
        rows = placement_table(
            config,
            own_head=schemes[HEAD.removesuffix(".weight")] is not None,
            has_kv_scales=self.scheme.kv_granularity == "per_channel",
        )
        self._parts: Parts = find_parts(path, self._ranks, rows, schemes, model_file.path)
        self._checked: set[str] = set()
        linears = dict(self._linear_infos())
        self.quantized = frozenset(linears)
        plain = {name: part.info for name, part in self._parts.floats.items()}
        scales = {
            f"{module}.{letter}_scale": parts[kind].info
            for module, parts in self._parts.caches.items()
            for letter, kind in (("k", KEY_SCALE), ("v", VALUE_SCALE))
        }
        self.tensors: Mapping[str, TensorInfo] = {**plain, **scales, **linears}

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of what `tensors` says, in its dtype.

        Raises:
            CheckpointError: a value of its linear, or of its KV cache, that is not zero, one or finite
                as it must be; or ranks that hold different scales.
        """
        import torch

        from parallel.checkpoint.readers.golden_stick.scales import input_scale
        from parallel.checkpoint.readers.golden_stick.values import transposed, weight_scale
        from parallel.checkpoint.readers.golden_stick.zero_point import input_zero_point

        if name in self._parts.floats:
            return self._read_float(name, index)
        module, _, kind = name.rpartition(".")
        if module in self._parts.caches:
            return self._read_cache(module, kind, index)
        parts = self._parts.linears[module]
        self._check(parts)
        if kind == INPUT_SCALE_NAME:
            return input_scale(parts)[index]
        if kind == INPUT_ZERO_POINT:
            return torch.tensor([input_zero_point(parts)], dtype=torch.int8)[index]
        if kind == "weight" + SCALE_SUFFIX:
            return weight_scale(parts, index)
        return transposed(parts, index) if parts.scheme.bits == 4 else parts.read(WEIGHT, index)

    def identity(self) -> dict[str, Any]:
        """All files, and the scheme, without which they mean nothing."""
        files = {name: file.identity() for name, file in sorted(self._files().items())}
        return {"files": files, "scheme": self.scheme.to_dict()}

    def _files(self) -> dict[str, TensorFile]:
        return {
            (rank.path / name).relative_to(self.path).as_posix(): file
            for rank in self._ranks
            for name, file in rank.files.items()
        }

    def _read_float(self, name: str, index: Index) -> Tensor:
        from parallel.checkpoint.readers.golden_stick.zero_point import (
            has_corrected_bias,
            original_bias,
        )

        stored = self._parts.floats[name].read(index)
        parts = self._parts.linears.get(name.rpartition(".")[0])
        if parts is None or not has_corrected_bias(parts):
            return stored
        return original_bias(parts, stored, index[0])

    def _check(self, parts: LinearParts) -> None:
        from parallel.checkpoint.readers.golden_stick.values import check_linear

        if parts.module not in self._checked:
            check_linear(parts, self.path)
            self._checked.add(parts.module)

    def _read_cache(self, module: str, kind: str, index: Index) -> Tensor:
        from parallel.checkpoint.readers.golden_stick.cache import check_cache

        parts = self._parts.caches[module]
        if module not in self._checked:
            check_cache(parts, self.path)
            self._checked.add(module)
        return parts[KEY_SCALE if kind == "k_scale" else VALUE_SCALE].tensor.read(index)

    def _linear_infos(self) -> Iterator[tuple[str, TensorInfo]]:
        """The parts of each linear as `prepare` stores them."""
        for parts in self._parts.linears.values():
            rows, columns = parts.shape
            file = parts[WEIGHT].info.file
            name = f"{parts.module}.weight"
            num_bytes = -(-columns // parts.scheme.values_per_byte)
            yield (
                name,
                TensorInfo((rows, num_bytes), STORED_DTYPES[parts.scheme.weight_dtype], file),
            )
            dtype = parts[SCALE].info.dtype if SCALE in parts else "float32"
            num_groups = parts.num_groups
            yield name + SCALE_SUFFIX, TensorInfo((rows, num_groups), dtype, file)
            if parts.scheme.is_static:
                yield f"{parts.module}.{INPUT_SCALE_NAME}", TensorInfo((1,), "float32", file)
                yield f"{parts.module}.{INPUT_ZERO_POINT}", TensorInfo((1,), "int8", file)


def _linear_schemes(
    scheme: QuantScheme, config: ModelConfig, path: Path
) -> dict[str, LinearScheme | None]:
    try:
        return scheme.for_modules(linear_modules(config))
    except QuantError as error:
        raise CheckpointError(f"{path}: quantization_config: {error}") from error
