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
from parallel.calibration.held_out import HeldOut
from parallel.calibration.read import embed, read_layer
from parallel.calibration.result import CalibratedLayer, LayerError, collect
from parallel.calibration.samples import RankSamples, deal, lone_threads
from parallel.checkpoint.calibration_state import CalibrationState
from parallel.checkpoint.source import Source
from parallel.group import Group
from parallel.model.config import ModelConfig
from quant.methods.layer import Layer
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
        held_out_ids: texts that pass the layers without a say in the result.
    """

    config: ModelConfig
    source: Source
    token_ids: Sequence[Sequence[int]]
    recipe_of: Callable[[int], Recipe | None]
    dtype: torch.dtype = torch.float32
    block_samples: int = BLOCK_SAMPLES
    held_out_ids: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        assert self.token_ids, "there are samples"
        assert all(self.token_ids), "samples have tokens"

    @property
    def longest_sample(self) -> int:
        """Tokens, held-out texts included."""
        return max(map(len, (*self.token_ids, *self.held_out_ids)))

    def identity(self) -> str:
        """A sum of all that the result depends on."""
        recipes = [repr(self.recipe_of(index)) for index in range(self.config.num_hidden_layers)]
        said = [
            repr(self.config), self.source.identity(), [list(ids) for ids in self.token_ids],
            recipes, str(self.dtype), self.block_samples,
        ]  # fmt: skip
        return _sum(said)

    def state_identity(self, group: Group) -> str:
        """A sum of all that the files of an unfinished calibration depend on."""
        return _sum([self.identity(), [list(ids) for ids in self.held_out_ids], group.size])


def _sum(said: object) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def calibrate(
    calibration: Calibration,
    group: Group,
    *,
    state_dir: Path | None = None,
    num_threads: int | None = None,
    on_layer: Callable[[int], object] = lambda index: None,
    held_out: HeldOut | None = None,
) -> Iterator[CalibratedLayer]:
    """Each decoder layer as it becomes, whole, on every rank; the same bits on any number of ranks
    and threads.

    Args:
        group: every rank walks, with its share of the samples.
        state_dir: where to keep what is done, and to look for it at first; None: nothing is kept.
        num_threads: of this rank, each of which holds the activations of a sample; torch's own
            number if None.
        on_layer: told each layer's index when it is begun.
        held_out: texts that pass the layers too; asked for their perplexities when all are done.

    Raises:
        CheckpointError: a damaged weight, or a `state_dir` of another calibration.
        QuantError: a Hessian that cannot be factored.
    """
    state = None
    if state_dir is not None:
        state = CalibrationState(state_dir, calibration.state_identity(group), group)
    first = state.next_layer() if state else 0
    for index in range(first):
        assert state is not None, "something was kept"
        yield CalibratedLayer.from_tensors(index, state.layer(index))
    rounds = deal(len(calibration.token_ids), calibration.block_samples, group)
    forward = LayerForward(calibration.config, calibration.dtype, calibration.longest_sample)
    count = len(calibration.token_ids)
    if state and first:
        kept = state.hidden(first)
        hidden = {index: x_TD for index, x_TD in kept.items() if index < count}
        if held_out is not None:
            held_out.from_tensors(count, kept)
    else:
        hidden = _embed(calibration, rounds)
        if held_out is not None:
            held_out.begin(calibration.source, group, calibration.dtype)
    for index in range(first, calibration.config.num_hidden_layers):
        on_layer(index)
        with lone_threads(num_threads) as threads:
            samples = RankSamples(group, forward, threads, hidden, rounds, count)
            done = _walk_layer(calibration, index, samples, held_out)
        hidden = samples.hidden
        if state is not None:
            streams = held_out.to_tensors(count) if held_out else {}
            state.save(index, done.to_tensors(), hidden | streams)
        yield done
        del done  # or its integers would stand beside the next one's


def _embed(calibration: Calibration, rounds: Sequence[range]) -> dict[int, Tensor]:
    mine = {index: calibration.token_ids[index] for block in rounds for index in block}
    return embed(calibration.source, mine, calibration.dtype)


def _walk_layer(
    calibration: Calibration, index: int, samples: RankSamples, held_out: HeldOut | None
) -> CalibratedLayer:
    """Read a layer, quantize it, and put the samples behind it."""
    layer = read_layer(calibration.source, calibration.config, index)
    if held_out is not None:
        held_out.pass_float(samples.forward, samples.threads, layer)
    done = _quantize_layer(calibration, index, layer, samples)
    if held_out is not None:
        held_out.pass_rounded(samples.forward, samples.threads, layer)
    return done


def _quantize_layer(
    calibration: Calibration, index: int, layer: Layer, samples: RankSamples
) -> CalibratedLayer:
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
