"""PTQ: one decoder layer at a time, outliers suppressed, errors made up for, weights rounded.

The order is Golden Stick's: scales that tame outliers are folded into the layer (SmoothQuant or
AWQ), its weights are rounded (to nearest, or by GPTQ, each with the inputs that the products before
it give as they are now rounded), then the scales of static activations and of the KV cache are taken
from the rounded layer. Whoever walks the layers computes the next one's inputs with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from quant.calibrate import (
    ChannelAmax,
    ChannelMean,
    Hessian,
    KeyValueAmax,
    Observer,
    Reduced,
    TensorAmax,
    channel_mean,
)
from quant.inputs import INPUTS
from quant.methods.awq import awq_scales, best_scale
from quant.methods.folding import fold
from quant.methods.gptq import GPTQArguments, factor, round_rows
from quant.methods.layer import Layer, Product, Rounded
from quant.methods.smooth_quant import smooth
from quant.numeric import Grid
from quant.rounding import quantize

# The part of a layer whose output judges a scale of AWQ.
BLOCKS = {
    "qkv_proj": "attention",
    "o_proj": "attention",
    "gate_up_proj": "mlp",
    "down_proj": "mlp",
}
# What observes keys and values; the other names are those of INPUTS.
KEY_VALUE = "key_value"


class Samples(Protocol):
    """What a method asks of the calibration samples, wherever they and the ranks are."""

    def observe(
        self, layer: Layer, makers: Mapping[str, Callable[[], Observer]]
    ) -> dict[str, Reduced]:
        """Run every sample through the layer as it is now.

        Args:
            makers: for names of INPUTS, or KEY_VALUE, what makes a fresh observer of it.

        Returns:
            What the observers of all ranks have kept together, by the same names.
        """
        ...

    def judge(self, layer: Layer, block: str) -> Callable[[Layer], float]:
        """A function of a changed layer: the squared error of a block's output on all samples.

        Args:
            layer: as it is now: the truth.
            block: "attention" or "mlp".
        """
        ...

    def round(
        self,
        shape: tuple[int, int],
        grid: Grid,
        scale_dtype: torch.dtype,
        round_block: Callable[[slice], Rounded],
    ) -> Rounded:
        """Round a weight [N, K] by blocks of rows, which the ranks divide among themselves."""
        ...


@dataclass(frozen=True)
class Recipe:
    """What is done to a layer.

    Attributes:
        scale_dtype: of stored scales; the checkpoint's.
        grids: the integers of each product, by its short name; those not named stay floats.
        suppression: "smooth", "awq" or None.
        folds: the inputs that suppression may divide, of INPUTS.
        alpha: of SmoothQuant.
        gptq: arguments of GPTQ, or None: weights are rounded to nearest.
        activations: "per_token", "per_tensor" (static), or None: floats.
        key_values: "per_token", "per_channel" (static), or None: floats.
    """

    scale_dtype: torch.dtype
    grids: Mapping[str, Grid] = field(
        default_factory=lambda: dict.fromkeys(sum(INPUTS.values(), ()), Grid())
    )
    suppression: str | None = None
    folds: tuple[str, ...] = tuple(INPUTS)
    alpha: float = 0.5
    gptq: GPTQArguments | None = None
    activations: str | None = None
    key_values: str | None = None

    def __post_init__(self) -> None:
        assert self.suppression in (None, "smooth", "awq"), self.suppression
        assert self.activations in (None, "per_token", "per_tensor"), self.activations
        assert self.key_values in (None, "per_token", "per_channel"), self.key_values
        assert set(self.folds) <= set(INPUTS), self.folds
        for grid in self.grids.values() if self.gptq else ():
            self.gptq.check(grid)  # type: ignore[union-attr]  # asked for one line above

    def is_rounded(self, name: str) -> bool:
        """Whether any product of an input is rounded."""
        return any(product in self.grids for product in INPUTS[name])


def quantize_layer(layer: Layer, samples: Samples, recipe: Recipe) -> None:
    """Replace what the layer holds by what it becomes.

    Raises:
        ValueError: a weight holds an infinity or a NaN.
        QuantError: a Hessian that cannot be factored.
    """
    _suppress(layer, samples, recipe)
    for name, products in INPUTS.items():
        _round_products(layer, samples, recipe, name)
        _materialize(layer, [product for product in products if product not in recipe.grids])
    _round_activations(layer, samples, recipe)


def _suppress(layer: Layer, samples: Samples, recipe: Recipe) -> None:
    names = [name for name in recipe.folds if recipe.is_rounded(name)]
    if recipe.suppression == "smooth":
        widths = {name: _width(layer, name) for name in names}
        seen = samples.observe(layer, {n: _maker(ChannelAmax, k) for n, k in widths.items()})
        for name in names:
            smooth(layer, name, seen[name]["amax"], recipe.alpha)
    elif recipe.suppression == "awq":
        _search(layer, samples, recipe, names)


def _search(layer: Layer, samples: Samples, recipe: Recipe, names: list[str]) -> None:
    """AWQ: fold the best of its scales into each input."""
    makers = {name: _maker(ChannelMean, _width(layer, name)) for name in names}
    means = {name: channel_mean(seen) for name, seen in samples.observe(layer, makers).items()}
    for block in dict.fromkeys(BLOCKS[name] for name in names):
        loss_of = samples.judge(layer, block)
        best: dict[str, Tensor] = {}
        for name in (name for name in names if BLOCKS[name] == block):
            grid = next(recipe.grids[p] for p in INPUTS[name] if p in recipe.grids)
            candidates = awq_scales(layer, name, means[name], grid)
            best[name] = best_scale(
                candidates,
                lambda scale_K, name=name, loss_of=loss_of: loss_of(  # type: ignore[misc]
                    _trial(layer, samples, recipe, name, scale_K)
                ),
            )
        # Not before all are found: the judge's inputs are those of the block's norm as it was.
        for name, scale_K in best.items():
            fold(layer, name, scale_K)


def _trial(layer: Layer, samples: Samples, recipe: Recipe, name: str, scale_K: Tensor) -> Layer:
    """The layer with the products of one input scaled and rounded to nearest."""
    trial = replace(layer, products=dict(layer.products))
    for product in (product for product in INPUTS[name] if product in recipe.grids):
        scaled = replace(layer.products[product], columns_K=scale_K)
        rounded = _round(samples, recipe, product, scaled, _nearest(scaled, recipe, product))
        trial.change([product], weight=rounded, divisor_K=scale_K)
    return trial


def _round_products(layer: Layer, samples: Samples, recipe: Recipe, name: str) -> None:
    products = [product for product in INPUTS[name] if product in recipe.grids]
    if not products:
        return
    makers = {product: _nearest(layer.products[product], recipe, product) for product in products}
    if recipe.gptq is not None:
        makers = _corrected(layer, samples, recipe, name, products)
    for product in products:
        rounded = _round(samples, recipe, product, layer.products[product], makers.pop(product))
        layer.change([product], weight=rounded, columns_K=None, rows_N=None)


def _round(
    samples: Samples,
    recipe: Recipe,
    name: str,
    product: Product,
    round_block: Callable[[slice], Rounded],
) -> Rounded:
    return samples.round(product.shape, recipe.grids[name], recipe.scale_dtype, round_block)


def _nearest(product: Product, recipe: Recipe, name: str) -> Callable[[slice], Rounded]:
    """Round to nearest, block by block."""
    grid = recipe.grids[name]

    def round_block(rows: slice) -> Rounded:
        values_RK, scale_RG = quantize(product.rows(rows), grid, recipe.scale_dtype)
        return Rounded(values_RK, scale_RG, grid.group_size)

    return round_block


def _corrected(
    layer: Layer, samples: Samples, recipe: Recipe, name: str, products: list[str]
) -> dict[str, Callable[[slice], Rounded]]:
    """Round by GPTQ, block by block; the products of an input share one Hessian."""
    assert recipe.gptq is not None, "asked for by whoever calls"
    arguments = recipe.gptq
    seen = samples.observe(layer, {name: _maker(Hessian, _width(layer, name))})
    factored = factor(seen.pop(name)["hessian"], arguments)

    def maker(product: Product, grid: Grid) -> Callable[[slice], Rounded]:
        return lambda rows: round_rows(
            product.rows(rows), factored, grid, recipe.scale_dtype, arguments
        )

    return {name: maker(layer.products[name], recipe.grids[name]) for name in products}


def _materialize(layer: Layer, names: list[str]) -> None:
    """A product that stays a float gets a weight of its own where something was folded into it."""
    for name in names:
        product = layer.products[name]
        if product.columns_K is not None or product.rows_N is not None:
            assert isinstance(product.weight, Tensor), "not rounded"
            folded_NK = product.folded(product.weight.dtype)
            layer.change([name], weight=folded_NK, columns_K=None, rows_N=None)
            layer.changed.add(f"{name}.weight")


def _round_activations(layer: Layer, samples: Samples, recipe: Recipe) -> None:
    makers: dict[str, Callable[[], Observer]] = {}
    names = [name for name in INPUTS if recipe.is_rounded(name)]
    if recipe.activations == "per_tensor":
        makers = dict.fromkeys(names, TensorAmax)
    if recipe.key_values == "per_channel":
        makers[KEY_VALUE] = lambda: KeyValueAmax(layer.num_kv_heads, layer.head_dim)
    seen = samples.observe(layer, makers) if makers else {}
    for name in names if recipe.activations else ():
        products = [product for product in INPUTS[name] if product in recipe.grids]
        amax = seen[name]["amax"] if name in seen else None
        layer.change(products, static_amax=amax, is_dynamic=amax is None)
    layer.rounds_key_values = recipe.key_values is not None
    if KEY_VALUE in seen:
        layer.key_value_amax_2HC = torch.stack([seen[KEY_VALUE]["key"], seen[KEY_VALUE]["value"]])


def _width(layer: Layer, name: str) -> int:
    return layer.products[INPUTS[name][0]].shape[1]


def _maker(observer: Callable[[int], Observer], num_channels: int) -> Callable[[], Observer]:
    return lambda: observer(num_channels)
