"""One decoder layer, whole on one rank, on one sample; every product's input can be looked at.

The step is the decoder's own (parallel/model/decoder.py): where its linears and its cache stand,
there stand ones that tell what they are given.

Shape suffixes: T tokens, D hidden, K in_features, H kv heads, C head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.generation.cache import KVCache
from parallel.model.config import ModelConfig
from parallel.model.decoder import MLP, Attention, HeadNorm, RMSNorm, Segment, Step, StepContext
from parallel.model.placements import HEAD_NORMS
from parallel.model.rope import cos_sin_table
from quant.activations import LEVELS_INT8, quantize_rows
from quant.inputs import INPUTS
from quant.methods.layer import Layer, Product, input_scale
from quant.methods.ptq import KEY_VALUE

# Told the name of an input, and the input; it may keep the tensor.
Tap = Callable[[str, Tensor], object]
CPU = torch.device("cpu")


class LayerForward:
    """The forward functions of a layer.

    Args:
        dtype: the compute dtype.
        max_length: the longest sample in tokens.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, max_length: int) -> None:
        self.config = config
        self.dtype = dtype
        self._cos_L1C, self._sin_L1C = cos_sin_table(config, max_length, dtype)

    def run(self, layer: Layer, x_TD: Tensor, tap: Tap = lambda name, x: None) -> Tensor:
        """The residual stream after the layer, [T, D]; x stays as it is."""
        x_TD = x_TD.clone()
        attention_TD = self.attention(layer, self.attention_input(layer, x_TD), tap)
        normed_TD = self._norm(layer, "post_attention_layernorm")(x_TD, attention_TD)
        return x_TD.add_(self.mlp(layer, normed_TD, tap))

    def attention_input(self, layer: Layer, x_TD: Tensor) -> Tensor:
        return self._norm(layer, "input_layernorm")(x_TD, None)

    def attention(self, layer: Layer, x_TD: Tensor, tap: Tap = lambda name, x: None) -> Tensor:
        """What attention adds to the residual stream, [T, D], of what its norm gives."""
        length = len(x_TD)
        cache = _TappedCache(layer, length, self.dtype, tap)
        attention = Attention(
            0,
            self.config.head_dim,
            _stand_in(layer, "qkv_proj", tap),
            _stand_in(layer, "o_proj", tap),
            window=layer.window,
            head_norm=self._head_norm(layer),
        )
        return attention(x_TD, self._context(length), cache)

    def mlp(self, layer: Layer, x_TD: Tensor, tap: Tap = lambda name, x: None) -> Tensor:
        """What the MLP adds to the residual stream, [T, D], of what its norm gives."""
        return MLP(_stand_in(layer, "gate_up_proj", tap), _stand_in(layer, "down_proj", tap))(x_TD)

    def block(self, layer: Layer, name: str, x_TD: Tensor) -> Tensor:
        """attention or mlp, by name."""
        return {"attention": self.attention, "mlp": self.mlp}[name](layer, x_TD)

    def block_input(self, layer: Layer, name: str, x_TD: Tensor) -> Tensor:
        """What the block's norm gives of the residual stream before the layer, [T, D]."""
        normed_TD = self.attention_input(layer, x_TD)
        if name == "attention":
            return normed_TD
        attention_TD = self.attention(layer, normed_TD)
        return self._norm(layer, "post_attention_layernorm")(x_TD.clone(), attention_TD)

    def _norm(self, layer: Layer, name: str) -> RMSNorm:
        return RMSNorm(layer.norms[name].to(self.dtype), self.config.rms_norm_eps)

    def _head_norm(self, layer: Layer) -> HeadNorm | None:
        if not self.config.qk_norm:
            return None
        q_weight_C, k_weight_C = (layer.norms[name].to(self.dtype) for name in HEAD_NORMS)
        return HeadNorm(q_weight_C, k_weight_C, self.config.rms_norm_eps)

    def _context(self, length: int) -> StepContext:
        places_T = torch.arange(length)
        none = torch.empty(0, dtype=torch.int64)
        step = Step(places_T, places_T, places_T, none, (Segment(0, 0, length, length),))
        return StepContext(step, self._cos_L1C, self._sin_L1C)


@dataclass(frozen=True)
class _Linears:
    """Stands where the decoder has the linears of one input."""

    name: str
    products: tuple[Product, ...]
    tap: Tap
    local_sizes: tuple[int, ...]

    def __call__(self, x_TK: Tensor) -> Tensor:
        self.tap(self.name, x_TK)
        return torch.cat([product(x_TK) for product in self.products], dim=1)


def _stand_in(layer: Layer, name: str, tap: Tap) -> Any:
    products = tuple(layer.products[product] for product in INPUTS[name])
    return _Linears(name, products, tap, tuple(product.shape[0] for product in products))


class _TappedCache(KVCache):
    """The cache of one layer and one sample; rounds keys and values as the layer says."""

    def __init__(self, layer: Layer, length: int, dtype: torch.dtype, tap: Tap) -> None:
        super().__init__(1, layer.num_kv_heads, layer.head_dim, 1, length, dtype, CPU)
        self._rounds = layer.rounds_key_values
        self._amax_2HC = layer.key_value_amax_2HC
        self._tap = tap

    def write(self, layer: int, slots_T: Tensor, k_THC: Tensor, v_THC: Tensor) -> None:
        self._tap(KEY_VALUE, torch.stack((k_THC, v_THC), dim=1))
        key_amax_HC, value_amax_HC = (None, None) if self._amax_2HC is None else self._amax_2HC
        if self._rounds:
            k_THC, v_THC = _rounded(k_THC, key_amax_HC), _rounded(v_THC, value_amax_HC)
        super().write(layer, slots_T, k_THC, v_THC)


def _rounded(x_THC: Tensor, amax_HC: Tensor | None) -> Tensor:
    """Keys or values as an int8 cache gives them back; None: each token's head by its own amax."""
    if amax_HC is None:
        q_RC, scale_R = quantize_rows(x_THC.flatten(0, 1), LEVELS_INT8)
        return (q_RC * scale_R[:, None]).to(x_THC.dtype).view(x_THC.shape)
    scale_HC = input_scale(amax_HC)
    q_THC = (x_THC.float() / scale_HC).round_().clamp_(-LEVELS_INT8, LEVELS_INT8)
    return (q_THC * scale_HC).to(x_THC.dtype)
