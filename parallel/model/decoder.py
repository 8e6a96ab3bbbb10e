"""The decoder: one step, tokens in and logits out, on static buffers.

Shape suffixes: T tokens of the step, S selected tokens, B sequences, D hidden, H local query
heads, K local kv heads, G query heads of a kv head, C head_dim, L length of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.generation.cache import KVCache
from parallel.group import Group
from parallel.layers import (
    ColumnParallelLinears,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from parallel.model.config import ModelConfig
from parallel.model.rope import cos_sin_table, rotate


@dataclass(frozen=True)
class Segment:
    """A run of one sequence's tokens in a prefill step.

    Attributes:
        row: the sequence's row of the cache.
        start: index of the first token among the step's tokens.
        stop: index after the last.
        length: positions of the cache in use after this step.
    """

    row: int
    start: int
    stop: int
    length: int


@dataclass(frozen=True)
class Step:
    """The input of one step.

    Attributes:
        token_ids_T, positions_T, slots_T: int64, one entry a token.
        select_S: which of the T tokens get logits.
        segments: the runs of a prefill; empty in decode, where token b is the next of row b.
        length: decode only: the longest sequence, counted with this step's token.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    select_S: Tensor
    segments: tuple[Segment, ...] = ()
    length: int = 0


@dataclass(frozen=True)
class RMSNorm:
    """Zhang and Sennrich (2019); the mean square is taken in float32."""

    weight_D: Tensor
    eps: float

    def __call__(self, x_TD: Tensor) -> Tensor:
        wide_TD = x_TD.float()
        scale_T = torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight_D * (wide_TD * scale_T).to(x_TD.dtype)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention over this rank's heads; kv heads are never repeated in memory."""

    layer: int
    head_dim: int
    qkv_proj: ColumnParallelLinears
    o_proj: RowParallelLinear

    def __call__(
        self, x_TD: Tensor, step: Step, masks: Masks, cos_sin: tuple[Tensor, Tensor], cache: KVCache
    ) -> Tensor:
        q_TE, k_TE, v_TE = self.qkv_proj(x_TD).split(self.qkv_proj.local_sizes, dim=1)
        q_THC = rotate(self._heads(q_TE), *cos_sin)
        k_TKC = rotate(self._heads(k_TE), *cos_sin)
        cache.write(self.layer, step.slots_T, k_TKC, self._heads(v_TE))
        attend = self._prefill if step.segments else self._decode
        return self.o_proj(attend(q_THC, step, masks, cache).flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.head_dim))

    def _prefill(self, q_THC: Tensor, step: Step, masks: Masks, cache: KVCache) -> Tensor:
        runs = [
            self._attend_run(q_THC[segment.start : segment.stop], segment, mask, cache)
            for segment, mask in zip(step.segments, masks, strict=True)
        ]
        return torch.cat(runs)

    def _attend_run(
        self, q_THC: Tensor, segment: Segment, mask_TL: Tensor, cache: KVCache
    ) -> Tensor:
        """One sequence: kv heads are the batch, the G query heads of each share its keys."""
        k_KLC, v_KLC = cache.row(self.layer, segment.row, segment.length)
        q_KGTC = q_THC.unflatten(1, (k_KLC.shape[0], -1)).permute(1, 2, 0, 3)
        num_groups = q_KGTC.shape[1]
        k_KGLC, v_KGLC = (x.unsqueeze(1).expand(-1, num_groups, -1, -1) for x in (k_KLC, v_KLC))
        out_KGTC = F.scaled_dot_product_attention(q_KGTC, k_KGLC, v_KGLC, mask_TL)
        return out_KGTC.permute(2, 0, 1, 3).flatten(1, 2)

    def _decode(self, q_BHC: Tensor, step: Step, masks: Masks, cache: KVCache) -> Tensor:
        """One token a sequence: the G query heads of a kv head are its rows of queries."""
        k_BKLC, v_BKLC = cache.rows(self.layer, q_BHC.shape[0], step.length)
        q_BKGC = q_BHC.unflatten(1, (k_BKLC.shape[1], -1))
        out_BKGC = F.scaled_dot_product_attention(q_BKGC, k_BKLC, v_BKLC, masks[0])
        return out_BKGC.flatten(1, 2)


@dataclass(frozen=True)
class MLP:
    """SwiGLU (Shazeer, 2020)."""

    gate_up_proj: ColumnParallelLinears
    down_proj: RowParallelLinear

    def __call__(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up_proj(x_TD).split(self.gate_up_proj.local_sizes, dim=1)
        return self.down_proj(F.silu(gate_TF).mul_(up_TF))


@dataclass(frozen=True)
class DecoderLayer:
    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: MLP

    def __call__(
        self, x_TD: Tensor, step: Step, masks: Masks, cos_sin: tuple[Tensor, Tensor], cache: KVCache
    ) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), step, masks, cos_sin, cache)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


Masks = tuple[Tensor, ...]


class Decoder:
    """One rank's part of the model; parallel/model/build.py puts it together.

    Args:
        max_length: the longest sequence, for the table of rotary angles.
    """

    def __init__(
        self,
        config: ModelConfig,
        group: Group,
        embed_tokens: VocabParallelEmbedding,
        layers: Sequence[DecoderLayer],
        norm: RMSNorm,
        lm_head: VocabParallelHead,
        *,
        num_local_kv_heads: int,
        max_length: int,
    ) -> None:
        self.config = config
        self.group = group
        self.embed_tokens = embed_tokens
        self.layers = layers
        self.norm = norm
        self.lm_head = lm_head
        self.num_local_kv_heads = num_local_kv_heads
        self.dtype = norm.weight_D.dtype
        self.device = norm.weight_D.device
        cos_LC, sin_LC = cos_sin_table(config, max_length, self.dtype)
        self._cos_LC, self._sin_LC = cos_LC.to(self.device), sin_LC.to(self.device)

    @torch.inference_mode()
    def __call__(self, step: Step, cache: KVCache) -> Tensor | None:
        """float32 logits [S, V] of the selected tokens on rank 0, None on the other ranks."""
        cos_sin = self._cos_LC[step.positions_T], self._sin_LC[step.positions_T]
        masks = _masks(step)
        x_TD = self.embed_tokens(step.token_ids_T)
        for layer in self.layers:
            x_TD = layer(x_TD, step, masks, cos_sin, cache)
        if step.select_S.numel() == 0:
            return None
        return self.lm_head(self.norm(x_TD[step.select_S]))

    def new_cache(self, num_rows: int, max_length: int) -> KVCache:
        """A cache for this rank's kv heads, in the compute dtype."""
        return KVCache(
            self.config.num_hidden_layers,
            self.num_local_kv_heads,
            self.config.head_dim,
            num_rows,
            max_length,
            self.dtype,
            self.device,
        )


def _masks(step: Step) -> Masks:
    """Which cached positions each query sees; made once a step, shared by the layers."""
    if not step.segments:
        visible_BL = _visible(step.positions_T, step.length)
        return (visible_BL[:, None, None, :],)
    return tuple(
        _visible(step.positions_T[segment.start : segment.stop], segment.length)
        for segment in step.segments
    )


def _visible(positions_T: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=positions_T.device) <= positions_T.unsqueeze(1)
