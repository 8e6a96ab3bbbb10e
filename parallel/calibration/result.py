"""What calibration gives for a decoder layer, and the same as named tensors, for a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.inputs import INPUTS
from quant.methods.layer import Layer, Rounded, input_scale


@dataclass(frozen=True)
class LayerError:
    """The rounded layer's output against the float layer's, of the same inputs, on all samples.

    Attributes:
        relative: |rounded - float| / |float|, norms over everything.
        cosine: of the angle between the two.
    """

    relative: float
    cosine: float


@dataclass(frozen=True)
class CalibratedLayer:
    """One decoder layer; linears go by their short names, such as `q_proj`.

    Attributes:
        rounded: the integers and scales of each linear that is quantized, whole.
        floats: the float tensors that the method has changed, by their checkpoint names less the
            layer's prefix (`input_layernorm.weight`, `self_attn.v_proj.bias`, `mlp.up_proj.weight`),
            in their stored dtype; all others are as they were.
        input_scales: float32 [1] of each linear with static int8 activations.
        key_scale, value_scale: float32 [kv heads, head_dim], of a static int8 cache.
    """

    index: int
    rounded: Mapping[str, Rounded]
    floats: Mapping[str, Tensor]
    input_scales: Mapping[str, Tensor]
    error: LayerError
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors that say everything; `from_tensors` is the way back."""
        error = (self.error.relative, self.error.cosine)
        tensors = {"error": torch.tensor(error, dtype=torch.float64)}
        for name, rounded in self.rounded.items():
            tensors[f"values/{name}"] = rounded.values_NK
            tensors[f"scale/{name}"] = rounded.scale_NG
            tensors[f"group_size/{name}"] = torch.tensor([rounded.group_size or 0])
        tensors |= {f"float/{name}": tensor for name, tensor in self.floats.items()}
        tensors |= {f"input/{name}": tensor for name, tensor in self.input_scales.items()}
        if self.key_scale is not None and self.value_scale is not None:
            tensors |= {"key_scale": self.key_scale, "value_scale": self.value_scale}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    @staticmethod
    def from_tensors(index: int, tensors: Mapping[str, Tensor]) -> CalibratedLayer:
        values = _under("values/", tensors)
        relative, cosine = tensors["error"].tolist()
        rounded = {
            name: Rounded(
                value, tensors[f"scale/{name}"], int(tensors[f"group_size/{name}"]) or None
            )
            for name, value in values.items()
        }
        return CalibratedLayer(
            index,
            rounded,
            _under("float/", tensors),
            _under("input/", tensors),
            LayerError(relative, cosine),
            tensors.get("key_scale"),
            tensors.get("value_scale"),
        )


# Where a layer's linears stand in a checkpoint, less its prefix.
MODULES = {
    product: f"{'self_attn' if name in ('qkv_proj', 'o_proj') else 'mlp'}.{product}"
    for name, products in INPUTS.items()
    for product in products
}

NORMS = ("input_layernorm", "post_attention_layernorm")


def collect(index: int, layer: Layer, error: LayerError) -> CalibratedLayer:
    """What a method has made of a layer."""
    amax_2HC = layer.key_value_amax_2HC
    key_scale, value_scale = (None, None) if amax_2HC is None else input_scale(amax_2HC)
    rounded, scales = {}, {}
    for name, product in layer.products.items():
        if isinstance(product.weight, Rounded):
            rounded[name] = product.weight
        if product.static_amax is not None:
            scales[name] = input_scale(product.static_amax)
    floats = {_stored_name(name): layer.float(name) for name in sorted(layer.changed)}
    return CalibratedLayer(index, rounded, floats, scales, error, key_scale, value_scale)


def _stored_name(name: str) -> str:
    """`v_proj.bias` -> `self_attn.v_proj.bias`; a norm's name is what it is."""
    module, _, kind = name.partition(".")
    return f"{MODULES.get(module, module)}.{kind}"


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
