"""A float checkpoint as calibration has changed it: its layers from the calibration's own files.

What `prepare` reads of it is what it would read of a prepared directory: integers and scales as they
are stored, and floats where a method folded something in or left a module alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from parallel.checkpoint.source import Source, TensorInfo
from parallel.placement import Index
from quant.numeric import pack_int4

# Stored name -> the name in the layer's file, and what to make of it.
_Origin = tuple[Path, str, Callable[[Tensor], Tensor]]


class CalibratedSource:
    """A Source.

    Args:
        source: the checkpoint that was calibrated.
        layer_files: of each decoder layer, in order; `CalibratedLayer.to_tensors` wrote them.
        modules: where a layer's linears stand, less its prefix, by their short names.
        bits: of each quantized row, by its name.
        identity: a sum of all that the calibration depended on.
    """

    def __init__(
        self,
        source: Source,
        layer_files: list[Path],
        modules: Mapping[str, str],
        bits: Mapping[str, int],
        identity: str,
    ) -> None:
        self._source, self._identity = source, identity
        self._origins: dict[str, _Origin] = {}
        for index, path in enumerate(layer_files):
            self._origins |= dict(_origins(f"model.layers.{index}.", path, modules, bits))
        self.path = source.path
        changed = {name: self._info(name) for name in self._origins}
        self.tensors: Mapping[str, TensorInfo] = {**source.tensors, **changed}

    def read(self, name: str, index: Index) -> Tensor:
        if name not in self._origins:
            return self._source.read(name, index)
        path, stored, make = self._origins[name]
        if len(index) == 1:
            return self._whole(name)[index]
        rows, columns = index
        with safe_open(path, "pt") as file:
            return make(file.get_slice(stored)[rows])[:, columns]

    def identity(self) -> dict[str, Any]:
        """The source's own, and the calibration's."""
        return {**self._source.identity(), "calibration": self._identity}

    def _whole(self, name: str) -> Tensor:
        path, stored, make = self._origins[name]
        with safe_open(path, "pt") as file:
            return make(file.get_tensor(stored))

    def _info(self, name: str) -> TensorInfo:
        tensor = self._whole(name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return TensorInfo(tuple(tensor.shape), dtype, self._origins[name][0].name)


def _origins(
    prefix: str, path: Path, modules: Mapping[str, str], bits: Mapping[str, int]
) -> Iterator[tuple[str, _Origin]]:
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    for stored in names:
        kind, _, short = stored.partition("/")
        weight = f"{prefix}{modules.get(short, '')}.weight"
        if kind == "values":
            yield weight, (path, stored, pack_int4 if bits[weight] == 4 else _as_it_is)
        elif kind == "scale":
            yield f"{weight}_scale", (path, stored, _as_it_is)
        elif kind == "input":
            yield f"{prefix}{modules[short]}.input_scale", (path, stored, _as_it_is)
        elif kind == "float":
            yield prefix + short, (path, stored, _as_it_is)
        elif stored in ("key_scale", "value_scale"):
            yield f"{prefix}self_attn.{stored[0]}_scale", (path, stored, torch.flatten)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
