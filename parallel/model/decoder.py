"""The decoder: one step, tokens in and logits out, on static buffers.

Shape suffixes: T tokens of the step, S selected tokens, B sequences, D hidden, H local query
heads, K local kv heads, G query heads of a kv head, E heads of q, k and v side by side, C head_dim,
L length of the cache, F local FFN, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.generation.cache import KVCache, StaticScales
from parallel.group import Group
from parallel.layers import (
    ColumnParallelLinears,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from parallel.model.captured import CapturedLayers, can_capture
from parallel.model.config import ModelConfig
from parallel.model.masks import score_masks
from parallel.model.rope import cos_sin_table
from quant.elementwise import norm_heads, rms_norm, rotate, silu_product


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

    @property
    def starts_sequence(self) -> bool:
        """Whether the run begins at the sequence's first position."""
        return self.length == self.stop - self.start

    def first_seen(self, window: int | None) -> int:
        """The first position that any of its queries sees."""
        first_query = self.length - (self.stop - self.start)
        return 0 if window is None else max(0, first_query + 1 - window)


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
class StepContext:
    """What the layers of one step share; made once a step.

    Attributes:
        step: its tokens.
        cos_L1C, sin_L1C: the rotary angles of every position.
    """

    step: Step
    cos_L1C: Tensor
    sin_L1C: Tensor
    _masks: dict[int | None, tuple[Tensor | None, ...]] = field(default_factory=dict, init=False)

    def masks(self, window: int | None) -> tuple[Tensor | None, ...]:
        """For each run of a prefill, or once for decode: what is added to the scores, 0 or -inf.

        None where every query sees every position, or the run is a whole prompt's beginning, which
        the attention masks by itself.

        Args:
            window: how many positions a query sees, its own included; None: all before it.
        """
        if window not in self._masks:
            self._masks[window] = score_masks(self.step, self.cos_L1C.dtype, window)
        return self._masks[window]


@dataclass(frozen=True)
class RMSNorm:
    """The norm of a residual stream that first takes up what the last product adds to it."""

    weight_D: Tensor
    eps: float

    def __call__(self, x_TD: Tensor, delta_TD: Tensor | None) -> Tensor:
        """The norm of x, after `x += delta` in place where there is one."""
        return rms_norm(x_TD, self.weight_D, self.eps, delta_TD)


@dataclass(frozen=True)
class HeadNorm:
    """The norms of each head of q and of each head of k (Qwen3): one weight for all heads of each."""

    q_weight_C: Tensor
    k_weight_C: Tensor
    eps: float

    def __call__(self, qkv: Tensor, num_heads: int, num_kv_heads: int) -> None:
        """Norm the heads of q and k, which begin each row, in place."""
        norm_heads(qkv, (num_heads, num_kv_heads), (self.q_weight_C, self.k_weight_C), self.eps)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention over this rank's heads; kv heads are never repeated in memory.

    Attributes:
        window: how many positions a query sees, its own included; None: all before it.
        head_norm: of q and k, before they are rotated, where the family has it.
    """

    layer: int
    head_dim: int
    qkv_proj: ColumnParallelLinears
    o_proj: RowParallelLinear
    window: int | None = None
    head_norm: HeadNorm | None = None

    def __call__(self, x_TD: Tensor, context: StepContext, cache: KVCache) -> Tensor:
        num_heads, num_kv_heads, _ = (size // self.head_dim for size in self.qkv_proj.local_sizes)
        qkv = self.qkv_proj(x_TD)
        if self.head_norm is not None:
            self.head_norm(qkv, num_heads, num_kv_heads)
        # q and k lie side by side: one rotation turns both.
        rotate(
            qkv,
            num_heads + num_kv_heads,
            context.cos_L1C,
            context.sin_L1C,
            context.step.positions_T,
        )
        qkv_TEC = qkv.unflatten(1, (-1, self.head_dim))
        q_THC, k_TKC, v_TKC = qkv_TEC.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        cache.write(self.layer, context.step.slots_T, k_TKC, v_TKC)
        attend = self.prefill if context.step.segments else self.decode
        return self.o_proj(attend(q_THC, context, cache).flatten(1))

    def prefill(self, q_THC: Tensor, context: StepContext, cache: KVCache) -> Tensor:
        runs = [
            self._attend_run(q_THC[segment.start : segment.stop], segment, mask, cache)
            for segment, mask in zip(context.step.segments, context.masks(self.window), strict=True)
        ]
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def _attend_run(
        self, q_THC: Tensor, segment: Segment, mask_TL: Tensor | None, cache: KVCache
    ) -> Tensor:
        """One sequence: kv heads are the batch, the G query heads of each share its keys."""
        first = segment.first_seen(self.window)
        k_KLC, v_KLC = cache.row(self.layer, segment.row, segment.length, first)
        q_KGTC = q_THC.unflatten(1, (k_KLC.shape[0], -1)).permute(1, 2, 0, 3)
        num_groups = q_KGTC.shape[1]
        k_KGLC, v_KGLC = (x.unsqueeze(1).expand(-1, num_groups, -1, -1) for x in (k_KLC, v_KLC))
        is_causal = mask_TL is None and segment.starts_sequence
        out_KGTC = F.scaled_dot_product_attention(
            q_KGTC, k_KGLC, v_KGLC, mask_TL, is_causal=is_causal
        )
        return out_KGTC.permute(2, 0, 1, 3).flatten(1, 2)

    def decode(self, q_BHC: Tensor, context: StepContext, cache: KVCache) -> Tensor:
        """One token a sequence."""
        step = context.step
        return cache.attend(
            self.layer,
            q_BHC,
            step.positions_T,
            step.length,
            lambda: context.masks(self.window)[0],
            self.window,
        )


@dataclass(frozen=True)
class MLP:
    """SwiGLU (Shazeer, 2020)."""

    gate_up_proj: ColumnParallelLinears
    down_proj: RowParallelLinear

    def __call__(self, x_TD: Tensor) -> Tensor:
        gate_size, up_size = self.gate_up_proj.local_sizes
        return self.down_proj(silu_product(self.gate_up_proj(x_TD), (gate_size, up_size)))


@dataclass(frozen=True)
class DecoderLayer:
    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: MLP

    def __call__(
        self, x_TD: Tensor, delta_TD: Tensor | None, context: StepContext, cache: KVCache
    ) -> Tensor:
        """What this layer adds to the residual stream x at its end.

        Args:
            x_TD: overwritten by the sums before that.
            delta_TD: what the layer before this one adds.
        """
        delta_TD = self.self_attn(self.input_layernorm(x_TD, delta_TD), context, cache)
        return self.mlp(self.post_attention_layernorm(x_TD, delta_TD))


class Decoder:
    """One rank's part of the model; parallel/model/build.py puts it together.

    Args:
        max_length: the longest sequence, for the table of rotary angles.
        kv_granularity: of an int8 KV cache, per_token or per_channel; None: it is in the compute dtype.
        kv_scales: of each layer, with per_channel.
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
        kv_granularity: str | None = None,
        kv_scales: Sequence[StaticScales] = (),
    ) -> None:
        self.config = config
        self.group = group
        self.embed_tokens = embed_tokens
        self.layers = layers
        self.norm = norm
        self.lm_head = lm_head
        self.num_local_kv_heads = num_local_kv_heads
        self.kv_granularity = kv_granularity
        self.kv_scales = kv_scales
        self.dtype = norm.weight_D.dtype
        self.device = norm.weight_D.device
        cos_L1C, sin_L1C = cos_sin_table(config, max_length, self.dtype)
        self._cos_L1C, self._sin_L1C = cos_L1C.to(self.device), sin_L1C.to(self.device)
        self._can_capture = can_capture(self.device)
        self._captured: dict[int, CapturedLayers] = {}  # by the number of sequences
        self._captured_cache: KVCache | None = None

    @torch.inference_mode()
    def __call__(self, step: Step, cache: KVCache) -> Tensor | None:
        """float32 logits [S, V] of the selected tokens on rank 0, None on the other ranks."""
        x_TD = self.embed_tokens(step.token_ids_T)
        x_TD, delta_TD = self._run_layers(x_TD, step, cache)
        if step.select_S.numel() == 0:
            return None
        return self.lm_head(self.norm(x_TD[step.select_S], delta_TD[step.select_S]))

    def _run_layers(self, x_TD: Tensor, step: Step, cache: KVCache) -> tuple[Tensor, Tensor]:
        """The residual stream before the last layer adds to it, and what that adds."""
        if step.segments or not self._can_capture:
            return x_TD, self._walk(x_TD, step, cache, lambda: None)
        if self._captured_cache is not cache:
            self._captured, self._captured_cache = {}, cache
        captured = self._captured.setdefault(len(x_TD), CapturedLayers(self._walk, cache))
        found = captured(x_TD, step)
        self._can_capture = captured.spoiled is None
        return found

    def _walk(
        self, x_TD: Tensor, step: Step, cache: KVCache, before_layer: Callable[[], None]
    ) -> Tensor:
        context = StepContext(step, self._cos_L1C, self._sin_L1C)
        delta_TD = None
        for layer in self.layers:
            before_layer()
            delta_TD = layer(x_TD, delta_TD, context, cache)
        assert delta_TD is not None, "a model has layers"
        return delta_TD

    def new_cache(self, num_rows: int, max_length: int) -> KVCache:
        """A cache for this rank's kv heads."""
        return KVCache(
            self.config.num_hidden_layers,
            self.num_local_kv_heads,
            self.config.head_dim,
            num_rows,
            max_length,
            self.dtype,
            self.device,
            granularity=self.kv_granularity,
            scales=self.kv_scales,
        )
