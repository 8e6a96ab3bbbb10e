"""`consolidated.NN.pth`: the files of a model that Meta split, merged by name. Needs no torch to open.

Names become those of Hugging Face. Each tensor was cut along one axis among 1, 2, 4, 8 or 16 files, or
stands whole in each of them, as the norms do. Llama 1 and 2 cut the embedding along the hidden
dimension, Llama 3 along the vocabulary, which its shape tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.readers.pickled.file import TorchFile
from parallel.checkpoint.source import TensorInfo
from parallel.errors import CheckpointError
from parallel.placement import Index, Shape, index_shape

if TYPE_CHECKING:
    from torch import Tensor

PATTERN = "consolidated.*.pth"
_NORM, _EMBEDDING = "norm.weight", "tok_embeddings.weight"

# Meta's name, Hugging Face's, and the axis along which the files are parts; None: whole in each.
_MODEL: Mapping[str, tuple[str, int | None]] = {
    _EMBEDDING: ("model.embed_tokens.weight", 1),
    _NORM: ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}
_LAYER: Mapping[str, tuple[str, int | None]] = {
    "attention_norm": ("input_layernorm", None),
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "ffn_norm": ("post_attention_layernorm", None),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
}
_LAYER_NAME = re.compile(r"layers\.([0-9]{1,4})\.(.+)\.weight", re.ASCII)
# Frequencies of the rotary positions, which every loader computes anew.
_DROPPED = re.compile(r"(layers\.[0-9]{1,4}\.attention\.inner_attention\.)?rope\.freqs", re.ASCII)


@dataclass(frozen=True)
class _Merged:
    """A tensor of all files.

    Attributes:
        name: Meta's.
        axis: along which the files are parts; None: the files hold the same.
        shapes: of each file's part.
    """

    name: str
    axis: int | None
    shapes: tuple[Shape, ...]

    @property
    def shape(self) -> Shape:
        if self.axis is None:
            return self.shapes[0]
        shape = list(self.shapes[0])
        shape[self.axis] = sum(part[self.axis] for part in self.shapes)
        return tuple(shape)

    def pieces(self, index: Index) -> Iterator[tuple[int, Index]]:
        """The files that a slice touches, and the slice of each file's part."""
        if self.axis is None:
            yield from ((number, index) for number in range(len(self.shapes)))
            return
        cut, start = index[self.axis], 0
        for number, shape in enumerate(self.shapes):
            stop = start + shape[self.axis]
            own = slice(max(cut.start, start) - start, min(cut.stop, stop) - start)
            if own.start < own.stop:
                yield number, (*index[: self.axis], own, *index[self.axis + 1 :])
            start = stop


class ConsolidatedFiles:
    """All files of a directory as one, by Hugging Face's names, wq and wk still in Meta's order.

    Raises:
        CheckpointError: a file is missing or broken, a name is not known, or the files do not hold
            parts of the same tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [TorchFile(file) for file in _numbered(path)]
        self._merged = dict(self._merge())
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(
                item.shape, self.files[0].tensors[item.name].dtype, self.files[0].path.name
            )
            for name, item in self._merged.items()
        }

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of a merged tensor; where every file holds it all, they are compared."""
        import torch

        merged = self._merged[name]
        parts = [self.files[number].read(merged.name, own) for number, own in merged.pieces(index)]
        if merged.axis is None:
            self._check_equal(merged.name, parts)
        elif not parts:
            dtype = getattr(torch, self.tensors[name].dtype)
            return torch.empty(index_shape(index), dtype=dtype)
        elif len(parts) > 1:
            return torch.cat(parts, merged.axis)
        return parts[0]

    def identity(self) -> dict[str, Any]:
        return {"files": {file.path.name: file.identity() for file in self.files}}

    def _merge(self) -> Iterator[tuple[str, _Merged]]:
        first = self.files[0].tensors
        for file in self.files[1:]:
            for name in sorted({*_kept(first), *_kept(file.tensors)}):
                self._check_part(name, file)
        if _NORM not in first or _EMBEDDING not in first:
            raise CheckpointError(
                f"{self.files[0].path} has no {_NORM} or no {_EMBEDDING}, as every Llama of Meta has; "
                "give Meta's own files."
            )
        for name in _kept(first):
            renamed, axis = self._known(name)
            shapes = tuple(file.tensors[name].shape for file in self.files)
            yield renamed, self._joined(_Merged(name, self._axis(name, axis, shapes), shapes))

    def _check_part(self, name: str, file: TorchFile) -> None:
        first, found = self.files[0].tensors.get(name), file.tensors.get(name)
        if first is None or found is None or first.dtype != found.dtype:
            raise CheckpointError(
                f"{self.path}: {name[:200]!r} is {first.dtype if first else 'missing'} in "
                f"{self.files[0].path.name} and {found.dtype if found else 'missing'} in "
                f"{file.path.name}; download the files of one model."
            )

    def _known(self, name: str) -> tuple[str, int | None]:
        layer = _LAYER_NAME.fullmatch(name)
        if name in _MODEL:
            return _MODEL[name]
        if layer and layer[2] in _LAYER:
            renamed, axis = _LAYER[layer[2]]
            return f"model.layers.{int(layer[1])}.{renamed}.weight", axis
        raise CheckpointError(
            f"{self.files[0].path} has a tensor {name[:200]!r}, which no Llama of Meta has; give a "
            "dense Llama 1, 2 or 3."
        )

    def _axis(self, name: str, axis: int | None, shapes: tuple[Shape, ...]) -> int | None:
        if name != _EMBEDDING:
            return axis
        return 0 if shapes[0][1:] == self.files[0].tensors[_NORM].shape else 1

    def _joined(self, merged: _Merged) -> _Merged:
        """The same, after a check that the parts fit together but for the axis of the cut."""
        rank = 1 if merged.name.endswith(_NORM) else 2
        kept = {
            tuple(length for axis, length in enumerate(shape) if axis != merged.axis)
            for shape in merged.shapes
        }
        if len(kept) != 1 or any(len(shape) != rank for shape in merged.shapes):
            listed = ", ".join(str(list(shape)) for shape in merged.shapes)
            raise CheckpointError(
                f"{self.path}: {merged.name} has the shapes {listed}, which are no parts of one "
                "tensor; download the files of one model."
            )
        return merged

    def _check_equal(self, name: str, parts: list[Tensor]) -> None:
        import torch

        for file, part in zip(self.files, parts, strict=True):
            if not torch.equal(part.view(torch.uint8), parts[0].view(torch.uint8)):
                raise CheckpointError(
                    f"{self.path}: {name} must be the same in every file, but {file.path.name} has "
                    f"other values than {self.files[0].path.name}; download the files of one model."
                )


def _kept(names: Iterable[str]) -> list[str]:
    return [name for name in names if not _DROPPED.fullmatch(name)]


def _numbered(path: Path) -> list[Path]:
    """The files in the order of their numbers, of which none may be left out."""
    found = sorted(path.glob(PATTERN))
    for number, file in enumerate(found):
        if file.name != f"consolidated.{number:02}.pth":
            raise CheckpointError(
                f"{path / f'consolidated.{number:02}.pth'} is missing, but {file.name} is there; "
                "download all files of the model."
            )
    return found
