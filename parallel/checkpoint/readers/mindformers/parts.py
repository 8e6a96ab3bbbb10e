"""Where the parts of MindFormers' ranks lie in the tensors that Hugging Face names. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.checkpoint.readers.mindformers.names import hf_names
from parallel.checkpoint.readers.mindformers.strategy import Strategy
from parallel.checkpoint.readers.pieces import Piece, PiecedTensor
from parallel.checkpoint.source import TensorFile, TensorInfo
from parallel.errors import CheckpointError
from parallel.placement import Index, Shape

# Which axis MindFormers cuts for tensor parallelism, unless the ranks' parts are as large as the whole:
# so are norms and biases of the second kind, and perhaps the embedding and lm_head.
_CUT_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_CUT_COLUMNS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class _Cut:
    """How the ranks' parts of one stored tensor lie in the whole.

    Attributes:
        cuts: into how many slices each axis is cut.
        slices: which of them each rank has.
    """

    cuts: Shape
    slices: tuple[Shape, ...]


@dataclass(frozen=True)
class _Component:
    """What a stored tensor has of one of Hugging Face's: rows, all of them unless it is fused.

    Attributes:
        shape: of the whole.
        first_row: where it begins in each rank's part.
        part: its shape there.
    """

    name: str
    shape: Shape
    first_row: int
    part: Shape


class PartJoiner:
    """Makes whole tensors of what each rank holds.

    Args:
        path: the directory, for messages.
        shapes: of the model's tensors, by Hugging Face's names.
        strategy: what a strategy file says of some or all; the rest is placed by MindFormers' rules.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Shape], strategy: Strategy) -> None:
        self.path = path
        self._shapes = shapes
        self._strategy = strategy

    def join(self, stored: str, files: Sequence[TensorFile]) -> Iterator[tuple[str, PiecedTensor]]:
        """What a stored tensor is by Hugging Face's names; one that no such model has keeps its own,
        to be refused by it.

        Args:
            files: that of each rank, in order.

        Raises:
            CheckpointError: the ranks' parts differ, or do not join to the model's shapes.
        """
        info = self._info(stored, files)
        names = hf_names(stored)
        if not names or any(name not in self._shapes for name in names):
            place = tuple(slice(0, length) for length in info.shape)
            origin = (0,) * len(place)
            yield stored, PiecedTensor(info, [Piece(files[0], stored, origin, place)])
            return
        whole = _fused_shape([self._shapes[name] for name in names])
        if len(files) == len(names) == 1:
            whole = info.shape
        cut = self._cut(stored, names[0], info.shape, whole, len(files))
        for component in self._components(stored, names, info.shape, whole, cut):
            found = TensorInfo(component.shape, info.dtype, info.file)
            yield component.name, PiecedTensor(found, self._pieces(stored, files, component, cut))

    def _info(self, stored: str, files: Sequence[TensorFile]) -> TensorInfo:
        """What all ranks say of a tensor."""
        infos = [file.tensors[stored] for file in files]
        for file, info in zip(files, infos, strict=True):
            if (info.shape, info.dtype) != (infos[0].shape, infos[0].dtype):
                raise CheckpointError(
                    f"{file.path}: {stored} must be {infos[0].dtype} {list(infos[0].shape)} as in "
                    f"rank_0, but is {info.dtype} {list(info.shape)}; copy all ranks' files of one "
                    "checkpoint."
                )
        return infos[0]

    def _cut(self, stored: str, name: str, part: Shape, whole: Shape, num_ranks: int) -> _Cut:
        """By the strategy file where it names the tensor, else by the rules."""
        layout = self._strategy.get(stored)
        if layout is None:
            axis = None if part == whole else _cut_axis(name)
            return _by_rule(axis, len(part), num_ranks)
        if layout.num_ranks != num_ranks or len(layout.cuts) != len(part):
            raise CheckpointError(
                f"{self.path}: the strategy file places {stored}, {list(part)} on each of {num_ranks} "
                f"ranks, as {len(layout.cuts)} axes on {layout.num_ranks} ranks; take away the strategy "
                "files of other checkpoints."
            )
        return _Cut(layout.cuts, tuple(layout.slice_of(rank) for rank in range(num_ranks)))

    def _components(
        self, stored: str, names: Sequence[str], part: Shape, whole: Shape, cut: _Cut
    ) -> list[_Component]:
        if len(names) == 1:
            return [_Component(names[0], whole, 0, part)]
        rows = self._fused_rows(names, part, cut) if len(part) == len(whole) else []
        if not rows or sum(rows) != part[0]:
            raise self._misfit(stored, part, whole)
        return [
            _Component(name, self._shapes[name], sum(rows[:at]), (rows[at], *part[1:]))
            for at, name in enumerate(names)
        ]

    def _fused_rows(self, names: Sequence[str], part: Shape, cut: _Cut) -> list[int]:
        """How many rows of a rank's part each has: sliced first, then joined. q and gate, up are cut
        evenly; k and v, which several ranks may share, have what is left."""
        rows = [self._shapes[name][0] // cut.cuts[0] for name in names]
        return rows if len(names) == 2 else [rows[0], *[max(0, part[0] - rows[0]) // 2] * 2]

    def _pieces(
        self, stored: str, files: Sequence[TensorFile], component: _Component, cut: _Cut
    ) -> list[Piece]:
        cut = _shared_heads(component, cut)
        lengths = [n * length for n, length in zip(cut.cuts, component.part, strict=True)]
        holders: dict[Shape, list[TensorFile]] = {}
        for file, at in zip(files, cut.slices, strict=True):
            holders.setdefault(at, []).append(file)
        if tuple(lengths) != component.shape or len(holders) != math.prod(cut.cuts):
            raise self._misfit(stored, component.part, component.shape)
        origin = (component.first_row, *(0 for _ in component.part[1:]))[: len(component.part)]
        return [
            Piece(first, stored, origin, _place_of(at, component.part), tuple(copies))
            for at, (first, *copies) in holders.items()
        ]

    def _misfit(self, stored: str, part: Shape, whole: Shape) -> CheckpointError:
        where = "the strategy file" if stored in self._strategy else "MindFormers' rules"
        return CheckpointError(
            f"{self.path}: the ranks' parts of {stored}, {list(part)} each, must join to "
            f"{list(whole)} by {where}, but do not; use this checkpoint's own config.json and strategy "
            "file, and all its ranks."
        )


def _fused_shape(shapes: Sequence[Shape]) -> Shape:
    """Rows one after the other."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _cut_axis(name: str) -> int | None:
    """Of a weight or bias by Hugging Face's name."""
    module = name.rpartition(".")[0]
    if module.endswith(_CUT_ROWS):
        return 0
    return 1 if module.endswith(_CUT_COLUMNS) else None


def _by_rule(axis: int | None, num_axes: int, num_ranks: int) -> _Cut:
    """One axis is cut by the ranks in their order, or all ranks have the same."""
    cuts = tuple(num_ranks if at == axis else 1 for at in range(num_axes))
    slices = [
        tuple(rank if at == axis else 0 for at in range(num_axes)) for rank in range(num_ranks)
    ]
    return _Cut(cuts, tuple(slices))


def _shared_heads(component: _Component, cut: _Cut) -> _Cut:
    """kv heads that are fewer than the ranks: neighbours hold the same."""
    is_kv = component.name.rpartition(".")[0].endswith(("k_proj", "v_proj"))
    if not is_kv or not component.part or not component.part[0]:
        return cut
    num_slices, rest = divmod(component.shape[0], component.part[0])
    if rest or num_slices >= cut.cuts[0] or cut.cuts[0] % num_slices:
        return cut
    slices = tuple((at[0] * num_slices // cut.cuts[0], *at[1:]) for at in cut.slices)
    return _Cut((num_slices, *cut.cuts[1:]), slices)


def _place_of(at: Shape, part: Shape) -> Index:
    return tuple(slice(k * length, (k + 1) * length) for k, length in zip(at, part, strict=True))
