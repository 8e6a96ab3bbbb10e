"""JSON files of a checkpoint directory, read with errors that are sentences."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel.checkpoint.regular_file import check_regular, reason
from parallel.errors import CheckpointError

# The manifest of a 405B on 64 ranks has some 25 MB.
_MOST_BYTES = 256 << 20


def read_json_object(
    path: Path, *, hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """An object of JSON.

    Args:
        hook: makes an object of its pairs; `distinct`, where another reader could take another of two
            values of one name.

    Raises:
        CheckpointError: the file is missing, is not JSON, or is not an object.
    """
    check_regular(path, _MOST_BYTES)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=hook)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({reason(error)}); copy it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, but holds a {type(value).__name__}; copy it again."
        )
    return value


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ. Raises ValueError for a name that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name[:200]!r} stands twice")
    return found
