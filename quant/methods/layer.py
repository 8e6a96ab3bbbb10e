"""A decoder layer as a method sees it: its products, its norms, and what was done to them so far.

A product's weight is kept as it was read; what a method folds into it are two vectors, multiplied in
where rows are needed. So nothing of a layer stands in memory twice: a weight is there as floats, and
after its rounding as integers.

Shape suffixes: M rows (tokens), N out_features, K in_features, G groups of a row, R rows of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quant.activations import LEVELS_INT8, quantize_rows
from quant.linear import linear
from quant.numeric import Grid, dequantize, dequantize_into

# Rows of a weight that one thread of one rank works on at a time. Fixed, as a product's bits may
# depend on its number of rows: that is why integers do not depend on who computes them.
BLOCK_ROWS = 256


@dataclass(frozen=True)
class Rounded:
    """int8 values [N, K] and scale [N, G] of a weight; `group_size` columns share a scale."""

    values_NK: Tensor
    scale_NG: Tensor
    group_size: int | None = None

    def rows(self, rows: slice, dtype: torch.dtype, out_RK: Tensor | None = None) -> Tensor:
        """The weight that the integers stand for, [R, K]; in `out_RK`, float32, where there is one."""
        values_RK, scale_RG = self.values_NK[rows], self.scale_NG[rows]
        if out_RK is None:
            return dequantize(values_RK, scale_RG, dtype, self.group_size)
        return dequantize_into(out_RK, values_RK, scale_RG, self.group_size)


@dataclass(frozen=True)
class Product:
    """One linear of the layer: `x @ weight.T + bias`.

    Attributes:
        weight: as it was read, or rounded.
        bias_N: or None.
        columns_K: float32; a float weight's columns are multiplied by it (its input is divided).
        rows_N: float32; a float weight's rows are divided by it (its output's reader multiplies).
        divisor_K: its input is divided by it; for trying a fold that was not made.
        static_amax: the input is rounded to int8 with the scale `static_amax / 127`.
        is_dynamic: the input is rounded to int8, each row by its own largest value.
    """

    weight: Tensor | Rounded
    bias_N: Tensor | None = None
    columns_K: Tensor | None = None
    rows_N: Tensor | None = None
    divisor_K: Tensor | None = None
    static_amax: Tensor | None = None
    is_dynamic: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        held = self.weight.values_NK if isinstance(self.weight, Rounded) else self.weight
        return held.shape[0], held.shape[1]

    def rows(self, rows: slice) -> Tensor:
        """float32 [R, K]: rows of the weight with what was folded into them."""
        if isinstance(self.weight, Rounded):
            return self.weight.rows(rows, torch.float32)
        wide_RK = self.weight[rows].to(torch.float32, copy=True)
        if self.columns_K is not None:
            wide_RK *= self.columns_K
        if self.rows_N is not None:
            wide_RK /= self.rows_N[rows, None]
        return wide_RK

    def folded(self, dtype: torch.dtype) -> Tensor:
        """[N, K]: the whole float weight with what was folded into it."""
        out_NK = torch.empty(self.shape, dtype=dtype)
        for rows in blocks(self.shape[0]):
            out_NK[rows] = self.rows(rows)
        return out_NK

    def column_amax(self) -> Tensor:
        """float32 [K]: the largest absolute value of each column."""
        amax_K = torch.zeros(self.shape[1])
        for rows in blocks(self.shape[0]):
            torch.maximum(amax_K, self.rows(rows).abs_().amax(dim=0), out=amax_K)
        return amax_K

    def __call__(self, x_MK: Tensor) -> Tensor:
        """[M, N] in x's dtype."""
        x_MK = self._rounded_input(x_MK)
        if isinstance(self.weight, Tensor):
            return self._multiply_floats(x_MK, self.weight)
        return _add(_multiply_rounded(x_MK, self.weight), self.bias_N)

    def _multiply_floats(self, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        if self.columns_K is not None:
            x_MK = (x_MK * self.columns_K).to(x_MK.dtype)
        out_MN = _multiply(x_MK, weight_NK)
        if self.rows_N is not None:
            out_MN = (out_MN / self.rows_N).to(x_MK.dtype)
        return _add(out_MN, self.bias_N)

    def _rounded_input(self, x_MK: Tensor) -> Tensor:
        if self.divisor_K is not None:
            x_MK = (x_MK / self.divisor_K).to(x_MK.dtype)
        if self.static_amax is not None:
            scale = input_scale(self.static_amax)
            q_MK = (x_MK.float() / scale).round_().clamp_(Grid().lowest, Grid().highest)
            return (q_MK * scale).to(x_MK.dtype)
        if self.is_dynamic:
            q_MK, scale_M = quantize_rows(x_MK, LEVELS_INT8)
            return (q_MK * scale_M[:, None]).to(x_MK.dtype)
        return x_MK


@dataclass
class Layer:
    """One decoder layer; a method replaces what it holds.

    Attributes:
        products: by short name, such as `q_proj`.
        norms: `input_layernorm` and `post_attention_layernorm`, and `q_norm` and `k_norm` where the
            family has them; the stored dtype.
        head_dim: channels of a head.
        window: how many positions a query sees, its own included; None: all before it.
        folded: the scale of each input (names of INPUTS) that was divided by one.
        changed: the float tensors that are no longer as they were read: `input_layernorm.weight`,
            `v_proj.bias`; of weights, those that stay floats.
        rounds_key_values: keys and values are rounded to int8: each token's of a head by its own
            largest value, or, where there is a `key_value_amax_2HC`, each channel's by that.
    """

    products: dict[str, Product]
    norms: dict[str, Tensor]
    head_dim: int
    window: int | None = None
    folded: dict[str, Tensor] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    rounds_key_values: bool = False
    key_value_amax_2HC: Tensor | None = None

    @property
    def num_kv_heads(self) -> int:
        return self.products["k_proj"].shape[0] // self.head_dim

    def float(self, name: str) -> Tensor:
        """A float tensor by its name as in `changed`."""
        owner, _, kind = name.partition(".")
        if owner in self.norms:
            return self.norms[owner]
        product = self.products[owner]
        found = product.weight if kind == "weight" else product.bias_N
        assert isinstance(found, Tensor), f"{name} is no float"
        return found

    def change(self, names: Iterable[str], **values: object) -> None:
        """Replace attributes of some products."""
        for name in names:
            self.products[name] = replace(self.products[name], **values)  # type: ignore[arg-type]


def input_scale(amax: Tensor) -> Tensor:
    """The float32 scale of static int8 activations, keys or values: `amax / 127`, 1 where amax is 0.

    It is a normal number: a subnormal one could be rounded down so far that it clips.
    """
    scale = amax.float() / torch.full_like(amax, LEVELS_INT8, dtype=torch.float32)
    return torch.where(amax > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), 1.0)


def blocks(num_rows: int) -> list[slice]:
    """The blocks of rows that are worked on as a whole, wherever they are worked on."""
    starts = range(0, num_rows, BLOCK_ROWS)
    return [slice(start, min(start + BLOCK_ROWS, num_rows)) for start in starts]


def _multiply(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """x @ weight.T; a weight of another dtype is converted a few rows at a time, in one place."""
    if weight_NK.dtype == x_MK.dtype:
        return linear(x_MK, weight_NK)
    place_RK = torch.empty(min(BLOCK_ROWS, len(weight_NK)), weight_NK.shape[1], dtype=x_MK.dtype)
    parts = []
    for rows in blocks(len(weight_NK)):
        floats_RK = place_RK[: rows.stop - rows.start].copy_(weight_NK[rows])
        parts.append(linear(x_MK, floats_RK))
    return torch.cat(parts, dim=1)


def _multiply_rounded(x_MK: Tensor, weight: Rounded) -> Tensor:
    """x @ weight.T; a few rows at a time, in one place: all its floats are never there at once."""
    num_rows, num_columns = weight.values_NK.shape
    place_RK = torch.empty(min(BLOCK_ROWS, num_rows), num_columns)
    parts = []
    for rows in blocks(num_rows):
        floats_RK = weight.rows(rows, torch.float32, place_RK[: rows.stop - rows.start])
        parts.append(linear(x_MK, floats_RK.to(x_MK.dtype)))
    return torch.cat(parts, dim=1)


def _add(out_MN: Tensor, bias_N: Tensor | None) -> Tensor:
    return out_MN if bias_N is None else out_MN + bias_N.to(out_MN.dtype)
