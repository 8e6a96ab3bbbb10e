"""What the parts of an int8 KV cache hold: scales, and words about them that must change nothing."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from parallel.checkpoint.readers.golden_stick.names import (
    BOTH_SCALES,
    BOTH_ZEROS,
    KEY_SCALE,
    KEY_SCALE_COPY,
    KEY_ZERO,
    KEY_ZERO_COPY,
    VALUE_SCALE,
    VALUE_SCALE_COPY,
    VALUE_ZERO,
    VALUE_ZERO_COPY,
)
from parallel.checkpoint.readers.golden_stick.parts import CacheParts
from parallel.checkpoint.readers.golden_stick.scales import CLOSE, REMEDY, as_floats
from parallel.errors import CheckpointError


def check_cache(parts: CacheParts, path: Path) -> None:
    """Raises CheckpointError for zero points that are not zero, or copies that say something else."""
    for kind in (KEY_ZERO, VALUE_ZERO, KEY_ZERO_COPY, VALUE_ZERO_COPY, BOTH_ZEROS):
        if kind in parts and bool((parts[kind].whole() != 0).any()):
            raise CheckpointError(
                f"{path}: {parts[kind].stored} holds zero points of the KV cache, which must all be 0 "
                f"to be computed here, but are not; {REMEDY}"
            )
    pair = as_floats(parts[BOTH_SCALES]) if BOTH_SCALES in parts else (None, None)
    for kind, copy_kind, half in (
        (KEY_SCALE, KEY_SCALE_COPY, pair[0]),
        (VALUE_SCALE, VALUE_SCALE_COPY, pair[1]),
    ):
        scale = parts[kind].whole()
        copy = as_floats(parts[copy_kind]) if copy_kind in parts else None
        for found, name in ((half, BOTH_SCALES), (copy, copy_kind)):
            if found is not None and not _is_copy(found, scale):
                raise CheckpointError(
                    f"{path}: {parts[name].stored} must hold the scales of {parts[kind].stored}, but "
                    "does not; quantize the checkpoint again."
                )


def _is_copy(found: Tensor, scale: Tensor) -> bool:
    """Equal but for the rounding of either to 16 bits."""
    return bool(((found.float() - scale.float()).abs() <= CLOSE * scale.float()).all())
