"""MindSpore's strategy files: which slice of each parameter a rank holds. Needs no torch.

They are protobuf messages (strategy_message.py), or the same as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.checkpoint.json_file import read_json_object
from parallel.checkpoint.readers.mindformers.strategy_message import LAYOUT_KEYS, read_message
from parallel.checkpoint.readers.mindspore.protobuf_fields import FieldError
from parallel.checkpoint.regular_file import check_regular, reason
from parallel.errors import CheckpointError
from parallel.placement import Shape

# That of a 70B has some 100 KB.
_MOST_BYTES = 64 << 20
_MOST_DIMS = 16


@dataclass(frozen=True)
class ParameterLayout:
    """How a parameter is cut.

    Attributes:
        dev_matrix: the ranks as a grid, row-major.
        tensor_map: for each axis of the tensor, which dimension of the grid cuts it, counted from the
            last; -1: none.
    """

    dev_matrix: Shape
    tensor_map: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        return math.prod(self.dev_matrix)

    @property
    def cuts(self) -> Shape:
        """Into how many slices each axis is cut."""
        return tuple(1 if at == -1 else self.dev_matrix[-at - 1] for at in self.tensor_map)

    def slice_of(self, rank: int) -> Shape:
        """Which of them the rank holds."""
        steps = [math.prod(self.dev_matrix[at + 1 :]) for at in range(len(self.dev_matrix))]
        return tuple(
            0 if at == -1 else rank // steps[-at - 1] % self.dev_matrix[-at - 1]
            for at in self.tensor_map
        )


Strategy = Mapping[str, ParameterLayout]


def is_strategy(path: Path) -> bool:
    """Whether a file is one, by its name: weights have the same suffix."""
    return "strategy" in path.name and path.suffix in (".ckpt", ".json")


def find_strategy(path: Path) -> Strategy | None:
    """What the strategy files say that lie in a directory of ranks, in its `strategy/`, or in one
    beside it; None: there are none.

    Raises:
        CheckpointError: one is damaged, two of them differ, or one says what is not read.
    """
    places = (path, path / "strategy", path.parent / "strategy")
    files = [file for place in places for file in sorted(place.glob("*")) if is_strategy(file)]
    if not files:
        return None
    first = read_strategy(files[0])
    for file in files[1:]:
        if read_strategy(file) != first:
            raise CheckpointError(
                f"{files[0]} and {file} must say the same of every parameter, but do not; keep the "
                "strategy files of this checkpoint alone."
            )
    return first


def read_strategy(path: Path) -> Strategy:
    """The layout of each parameter.

    Raises:
        CheckpointError: the file is damaged, or says what is not read: stages of a pipeline, shards of
            an optimizer.
    """
    check_regular(path, _MOST_BYTES)
    try:
        raw = _read_json(path) if path.suffix == ".json" else read_message(path)
        return {name: _layout(name, values) for name, values in raw.items()}
    except (FieldError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no strategy file of one tensor-parallel job: {error}; copy it again, or take it "
            "away, and the ranks' files are joined by MindFormers' rules."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); copy it again.") from error


def _layout(name: str, values: Mapping[str, Any]) -> ParameterLayout:
    """Raises FieldError where the grid and the map do not fit each other, or there is more."""
    stage, _, rest = name.partition("-")
    if rest and stage.isdecimal():
        raise FieldError(f"{name} belongs to a stage of a pipeline")
    more = [key for key, value in values.items() if key not in LAYOUT_KEYS[:2] and value]
    if more:
        raise FieldError(f"{name} has {more[0]} {values[more[0]]!r:.100}, which is not read")
    devices, axes = (_integers(name, key, values.get(key, [])) for key in LAYOUT_KEYS[:2])
    fits = all(0 < length < 1 << 20 for length in devices)
    if not fits or not all(-1 <= at < len(devices) for at in axes):
        raise FieldError(f"{name} has dev_matrix {list(devices)} and tensor_map {list(axes)}")
    return ParameterLayout(devices, axes)


def _integers(name: str, key: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > _MOST_DIMS:
        raise FieldError(f"{name} has {key} {values!r:.100}")
    if not all(type(value) is int for value in values):
        raise FieldError(f"{name} has {key} {values!r:.100}")
    return tuple(values)


def _read_json(path: Path) -> dict[str, Mapping[str, Any]]:
    items = read_json_object(path).get("parallel_layout_item")
    if not isinstance(items, dict) or not all(isinstance(item, dict) for item in items.values()):
        raise FieldError("it has no parallel_layout_item")
    return items
