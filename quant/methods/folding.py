"""Folding: the input of a product is divided by a scale, its columns are multiplied by it.

What divides the input is the step before it, so that nothing is left to do at run time:

    qkv_proj      input_layernorm's weight
    o_proj        v_proj's rows and bias; the query heads of a kv head share its scale
    gate_up_proj  post_attention_layernorm's weight
    down_proj     up_proj's rows and bias: down's input is silu(gate) * up

Shape suffixes: K channels of the input, V rows of v_proj, H kv heads, Q query heads of each,
C head_dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.inputs import INPUTS
from quant.methods.layer import Layer

# The norm, or the product, that divides each input.
PRECEDING = {
    "qkv_proj": "input_layernorm",
    "o_proj": "v_proj",
    "gate_up_proj": "post_attention_layernorm",
    "down_proj": "up_proj",
}


def share(layer: Layer, name: str, amount_K: Tensor) -> Tensor:
    """Statistics of an input's channels as the scale may use them, [K].

    o_proj's channels come from v_proj's through the query heads of each kv head: these have one
    value, the largest of theirs.
    """
    if name != "o_proj":
        return amount_K
    amount_HQC = amount_K.view(layer.num_kv_heads, -1, layer.head_dim)
    return amount_HQC.amax(dim=1, keepdim=True).expand_as(amount_HQC).reshape(-1)


def weight_amax(layer: Layer, name: str) -> Tensor:
    """float32 [K]: the largest absolute value of each column over all products of an input."""
    parts = [layer.products[product].column_amax() for product in INPUTS[name]]
    return share(layer, name, torch.stack(parts).amax(dim=0))


def fold(layer: Layer, name: str, scale_K: Tensor) -> None:
    """Divide an input of the layer by scale, in the step before it, and undo it in its products.

    A norm's weight is rounded to its stored dtype; the products are multiplied by what it was in
    fact divided by, so that this rounding costs nothing. A channel that would become zero or infinite
    there is left as it is. The biases of v_proj and up_proj are divided with their rows.

    Args:
        name: one of INPUTS.
        scale_K: float32 [K], positive; o_proj's is equal for the query heads of a kv head.
    """
    assert name not in layer.folded, f"{name} is folded already"
    source = PRECEDING[name]
    if source in layer.norms:
        scale_K = _divide_norm(layer, source, scale_K)
    else:
        _divide_rows(layer, source, _rows_of(layer, name, scale_K))
    for product in INPUTS[name]:
        layer.change([product], columns_K=scale_K)
    layer.folded[name] = scale_K


def _divide_norm(layer: Layer, source: str, scale_K: Tensor) -> Tensor:
    """The scale that the rounded norm was divided by in fact."""
    norm_K = layer.norms[source]
    divided_K = (norm_K.float() / scale_K).to(norm_K.dtype)
    is_lost = (divided_K == 0) | divided_K.isinf()
    divided_K = torch.where(is_lost, norm_K, divided_K)
    layer.norms[source] = divided_K
    layer.changed.add(f"{source}.weight")
    # A channel whose norm is zero is zero, whatever divides it.
    return torch.where(norm_K == 0, scale_K, norm_K.float() / divided_K.float())


def _divide_rows(layer: Layer, source: str, scale_N: Tensor) -> None:
    product = layer.products[source]
    assert isinstance(product.weight, Tensor), "rows are folded before the weight is rounded"
    bias_N = product.bias_N
    if bias_N is not None:
        bias_N = (bias_N.float() / scale_N).to(bias_N.dtype)
        layer.changed.add(f"{source}.bias")
    layer.products[source] = replace(product, rows_N=scale_N, bias_N=bias_N)


def _rows_of(layer: Layer, name: str, scale_K: Tensor) -> Tensor:
    """The scale of the rows that an input comes from: v_proj has one for all heads of a query."""
    if name != "o_proj":
        return scale_K
    scale_HQC = scale_K.view(layer.num_kv_heads, -1, layer.head_dim)
    assert torch.equal(scale_HQC, scale_HQC[:, :1].expand_as(scale_HQC)), "heads share the scale"
    return scale_HQC[:, 0].reshape(-1)
