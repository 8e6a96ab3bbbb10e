"""Where a part lies in the files of the ranks, and whether it is as it must be. Needs no torch.

Ranks cut what runs along the axis of a weight that tensor parallelism cuts, and have the rest whole.
What is fused is cut first and joined then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from parallel.checkpoint.readers.golden_stick.forms import Axes, Form
from parallel.checkpoint.readers.pieces import Piece, PiecedTensor
from parallel.checkpoint.source import TensorFile, TensorInfo
from parallel.errors import CheckpointError
from parallel.model.placements import Row
from parallel.placement import Index, Shape


@dataclass(frozen=True)
class Place:
    """What a stored tensor has of a module.

    Attributes:
        stored: its name.
        modules: the modules that are fused in it.
        at: which of them.
    """

    stored: str
    modules: tuple[str, ...]
    at: int


def check_form(
    files: Sequence[TensorFile], place: Place, rows: Sequence[Row], form: Form, said_by: str
) -> Axes:
    """Which of its forms a part has, on every rank the same.

    Args:
        rows: of the modules that are fused in it.
        said_by: what asks for the form.

    Raises:
        CheckpointError: it has none of them.
    """
    infos = [file.tensors[place.stored] for file in files]
    shapes, dtypes = [info.shape for info in infos], {info.dtype for info in infos}
    size = len(files)
    for axes in form.axes:
        parts = [_rank_shape(rows, axes, rank, size) for rank in range(size)]
        if shapes in (parts, [_whole_shape(rows, axes)] * size):
            break
    else:
        raise _misfit(files, place, form, _rank_shape(rows, form.axes[0], 0, size), said_by)
    if len(dtypes) > 1 or not dtypes <= {*form.dtypes}:
        raise _misfit(files, place, form, shapes[0], said_by)
    return axes


def place_part(
    path: Path, files: Sequence[TensorFile], place: Place, rows: Sequence[Row], axes: Axes
) -> tuple[PiecedTensor, tuple[PiecedTensor, ...]]:
    """A part over all ranks, and what each has where each has the whole of it."""
    row = rows[place.at]
    shape = tuple(axis.length(row.shape) for axis in axes)
    first = files[0].tensors[place.stored]
    info = TensorInfo(shape, first.dtype, files[0].path.relative_to(path).as_posix())
    is_whole = first.shape == _whole_shape(rows, axes)
    holders: dict[tuple[int, ...], list[Piece]] = {}
    for rank, file in enumerate(files):
        at, size = (0, 1) if is_whole else (rank, len(files))
        index = _rank_index(row, axes, at, size)
        before = _rank_shape(rows[: place.at], axes, at, size) if place.at else (0,) * len(axes)
        origin = tuple(n if axis.dim == 0 else 0 for n, axis in zip(before, axes, strict=True))
        key = tuple(cut.start for cut in index)
        holders.setdefault(key, []).append(Piece(file, place.stored, origin, index))
    pieces = [
        replace(same[0], copies=tuple(piece.file for piece in same[1:]))
        for same in holders.values()
    ]
    alike = next(iter(holders.values())) if len(holders) == 1 else []
    return PiecedTensor(info, pieces), tuple(PiecedTensor(info, [piece]) for piece in alike)


def _rank_index(row: Row, axes: Axes, rank: int, size: int) -> Index:
    """What a rank has of a module's part."""
    cuts = row.index(rank, size)
    return tuple(
        slice(0, axis.per)
        if axis.dim is None
        else slice(cuts[axis.dim].start // axis.per, cuts[axis.dim].stop // axis.per)
        for axis in axes
    )


def _rank_shape(rows: Sequence[Row], axes: Axes, rank: int, size: int) -> Shape:
    """Of the fused tensor that a rank stores."""
    indices = [_rank_index(row, axes, rank, size) for row in rows]
    return tuple(
        sum(index[n].stop - index[n].start for index in indices)
        if axis.dim == 0
        else indices[0][n].stop - indices[0][n].start
        for n, axis in enumerate(axes)
    )


def _whole_shape(rows: Sequence[Row], axes: Axes) -> Shape:
    return _rank_shape(rows, axes, 0, 1)


def _misfit(
    files: Sequence[TensorFile], place: Place, form: Form, shape: Shape, said_by: str
) -> CheckpointError:
    """Names the first file whose tensor is not as it must be."""
    file = next(
        (
            file
            for file in files
            if (at := file.tensors[place.stored]).shape != shape or at.dtype not in form.dtypes
        ),
        files[-1],
    )
    info = file.tensors[place.stored]
    return CheckpointError(
        f"{file.path}: {place.stored} must be {' or '.join(form.dtypes)} {list(shape)} by {said_by}, "
        f"but is {info.dtype} {list(info.shape)}; use the YAML that the checkpoint was quantized with."
    )
