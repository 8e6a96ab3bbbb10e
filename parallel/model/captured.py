"""The layers of a decode step as one call of C, as a CUDA graph is one launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parallel.generation.cache import KVCache
from quant.kernels.native.calls import is_available, open_library
from quant.kernels.native.recording import Program, Recording

if TYPE_CHECKING:
    from parallel.model.decoder import Step

# Runs the layers: what is added to the stream at its end. Calls its last argument before each layer.
Walk = Callable[[Tensor, "Step", KVCache, Callable[[], None]], Tensor]


class CapturedLayers:
    """The layers for decode steps of one number of sequences over one cache.

    The first step runs as always and is recorded; the next ones are the recorded calls on the same
    buffers. Where something was not a call of C, a product of torch or a collective over a network,
    the steps go on as always.
    """

    def __init__(self, walk: Walk, cache: KVCache) -> None:
        self._walk = walk
        self._cache = cache
        self._program: Program | None = None
        self.spoiled: str | None = None

    def __call__(self, x_BD: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The residual stream and what the last layer adds to it; good until the next call."""
        if self._program is None:
            self._record(x_BD, step)
            return self._x_BD, self._delta_BD
        self._x_BD.copy_(x_BD)
        self._step.positions_T.copy_(step.positions_T)
        self._step.slots_T.copy_(step.slots_T)
        self._program.run()
        return self._x_BD, self._delta_BD

    def _record(self, x_BD: Tensor, step: Step) -> None:
        self._x_BD = x_BD.clone()
        self._step = replace(
            step, positions_T=step.positions_T.clone(), slots_T=step.slots_T.clone()
        )
        with Recording() as recording:
            self._delta_BD = self._walk(self._x_BD, self._step, self._cache, recording.next_layer)
        self.spoiled = recording.spoiled
        if self.spoiled is None:
            self._program = recording.program(open_library().shardrun_run)


def can_capture(device: torch.device) -> bool:
    """Whether it is worth trying."""
    return device.type == "cpu" and is_available()
