"""The walk over the decoder layers: read one, quantize it, compute the next one's inputs with it.

Peak memory on each rank is one decoder layer and the activations of its samples.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from parallel.calibration.forward import LayerForward
from parallel.calibration.read import embed, read_layer
from parallel.calibration.result import CalibratedLayer, LayerError, collect
from parallel.calibration.samples import RankSamples, deal, lone_threads
from parallel.checkpoint.calibration_state import CalibrationState
from parallel.checkpoint.source import Source
from parallel.group import Group
from parallel.model.config import ModelConfig
from quant.methods.ptq import Recipe, quantize_layer

# Samples whose sums are put together before they meet those of others. Part of the result's bits.
BLOCK_SAMPLES = 8


@dataclass(frozen=True)
class Calibration:
    """What is calibrated, with what, and how.

    Attributes:
        source: a float checkpoint of the config's model.
        token_ids: the samples, of at least one token each.
        recipe_of: what is done to a layer, by its index; None: it stays as it is.
        dtype: the compute dtype.
        block_samples: see BLOCK_SAMPLES.
    """

    config: ModelConfig
    source: Source
    token_ids: Sequence[Sequence[int]]
    recipe_of: Callable[[int], Recipe | None]
    dtype: torch.dtype = torch.float32
    block_samples: int = BLOCK_SAMPLES

    def __post_init__(self) -> None:
        assert self.token_ids, "there are samples"
        assert all(self.token_ids), "samples have tokens"

    @property
    def longest_sample(self) -> int:
        """Tokens."""
        return max(map(len, self.token_ids))

    def identity(self, group: Group) -> str:
        """A sum of all that the result, and its division among the ranks, depend on."""
        recipes = [repr(self.recipe_of(index)) for index in range(self.config.num_hidden_layers)]
        said = [
            repr(self.config), self.source.identity(), [list(ids) for ids in self.token_ids],
            recipes, str(self.dtype), self.block_samples, group.size,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def calibrate(
    calibration: Calibration,
    group: Group,
    *,
    state_dir: Path | None = None,
    num_threads: int | None = None,
    on_layer: Callable[[int], object] = lambda index: None,
) -> Iterator[CalibratedLayer]:
    """Each decoder layer as it becomes, whole, on every rank; the same bits on any number of ranks
    and threads.

    Args:
        group: every rank walks, with its share of the samples.
        state_dir: where to keep what is done, and to look for it at first; None: nothing is kept.
        num_threads: of this rank, each of which holds the activations of a sample; torch's own
            number if None.
        on_layer: told each layer's index when it is begun.

    Raises:
        CheckpointError: a damaged weight, or a `state_dir` of another calibration.
        QuantError: a Hessian that cannot be factored.
    """
    state = None
    if state_dir is not None:
        state = CalibrationState(state_dir, calibration.identity(group), group)
    first = state.next_layer() if state else 0
    for index in range(first):
        assert state is not None, "something was kept"
        yield CalibratedLayer.from_tensors(index, state.layer(index))
    rounds = deal(len(calibration.token_ids), calibration.block_samples, group)
    forward = LayerForward(calibration.config, calibration.dtype, calibration.longest_sample)
    hidden = state.hidden(first) if state and first else _embed(calibration, rounds)
    for index in range(first, calibration.config.num_hidden_layers):
        on_layer(index)
        with lone_threads(num_threads) as threads:
            count = len(calibration.token_ids)
            samples = RankSamples(group, forward, threads, hidden, rounds, count)
            done = _walk_layer(calibration, index, samples)
        hidden = samples.hidden
        if state is not None:
            state.save(index, done.to_tensors(), hidden)
        yield done


def _embed(calibration: Calibration, rounds: Sequence[range]) -> dict[int, Tensor]:
    mine = {index: calibration.token_ids[index] for block in rounds for index in block}
    return embed(calibration.source, mine, calibration.dtype)


def _walk_layer(calibration: Calibration, index: int, samples: RankSamples) -> CalibratedLayer:
    """Read a layer, quantize it, and put the samples behind it."""
    layer = read_layer(calibration.source, calibration.config, index)
    recipe = calibration.recipe_of(index)
    if recipe is None:
        samples.hidden = dict(samples.outputs(layer))
        return collect(index, layer, LayerError(0.0, 1.0))
    floats = dict(samples.outputs(layer))
    quantize_layer(layer, samples, recipe)
    outputs: dict[int, Tensor] = {}
    products: dict[int, list[float]] = {}
    for sample, x_TD in samples.outputs(layer):
        outputs[sample] = x_TD
        products[sample] = _inner_products(floats.pop(sample), x_TD)
    samples.hidden = outputs
    return collect(index, layer, _error(samples.by_sample(products, 4)))


def _inner_products(float_TD: Tensor, rounded_TD: Tensor) -> list[float]:
    """|float|^2, |rounded|^2, float . rounded, |rounded - float|^2."""
    a, b = float_TD.double(), rounded_TD.double()
    return [float((x * y).sum()) for x, y in ((a, a), (b, b), (a, b), (b - a, b - a))]


def _error(products_S4: Tensor) -> LayerError:
    floats, rounded, both, difference = (sum(column) for column in products_S4.T.tolist())
    norms = math.sqrt(floats * rounded)
    if norms == 0:
        return LayerError(0.0, 1.0)
    return LayerError(math.sqrt(difference / floats), both / norms)
