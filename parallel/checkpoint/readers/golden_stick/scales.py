"""The scales of a linear's input and of its product, as floats."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.checkpoint.readers.golden_stick.names import INPUT_SCALE, PRODUCT_SCALE, SCALE
from parallel.checkpoint.readers.golden_stick.parts import LinearParts, StoredPart
from parallel.errors import CheckpointError

REMEDY = "give the unquantized checkpoint and quantize it with shardrun prepare."
# Two scales of 11 bits and their product, each rounded.
CLOSE = 2.0**-9


def input_scale(parts: LinearParts) -> Tensor:
    """float32 [1]; the files have one of each channel where an operator of theirs wants that.

    Raises:
        CheckpointError: they differ, or it is no scale.
    """
    stored = parts[INPUT_SCALE]
    scale = stored.whole().float()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CheckpointError(
            f"{stored.info.file}: {stored.stored} must hold finite scales above zero, but does not; "
            "calibrate again."
        )
    if not bool((scale == scale[0]).all()):
        raise CheckpointError(
            f"{stored.info.file}: {stored.stored} must be one scale for all channels of the input, but "
            f"they differ from {scale.min():.6g} to {scale.max():.6g}, which is smoothing when it runs; "
            f"{REMEDY}"
        )
    return scale[:1].clone()


def as_floats(stored: StoredPart) -> Tensor:
    """Scales in float32; where they are int64, the low half of each is the bits of one.

    Raises:
        CheckpointError: the high half says something else.
    """
    found = stored.whole()
    if found.dtype != torch.int64:
        return found.float()
    if not bool(((found >= 0) & (found < 1 << 31)).all()):
        raise CheckpointError(
            f"{stored.info.file}: {stored.stored} must hold the bits of positive float32 numbers as "
            "int64, but does not; quantize the checkpoint again."
        )
    return found.to(torch.int32).view(torch.float32)


def product_scale(parts: LinearParts) -> Tensor:
    """float64 [out]: what an integer sum of static activations is multiplied by."""
    if PRODUCT_SCALE in parts:
        return as_floats(parts[PRODUCT_SCALE]).double()
    return input_scale(parts).double() * parts[SCALE].whole().double()
