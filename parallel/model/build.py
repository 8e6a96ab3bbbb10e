"""Put one rank's parameters, by name, into the layers of a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from parallel.generation.cache import StaticScales
from parallel.group import Group
from parallel.layers import (
    ColumnParallelLinear,
    ColumnParallelLinears,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from parallel.model.config import ModelConfig
from parallel.model.decoder import MLP, Attention, Decoder, DecoderLayer, HeadNorm, RMSNorm
from parallel.model.parameters import FUSED
from parallel.model.placements import EMBEDDING, HEAD, HEAD_NORMS, KV_SCALES, Table, head_sizes
from parallel.placement import index_shape
from quant.weight import ReadyWeight


def build_decoder(
    config: ModelConfig,
    table: Table,
    weights: Mapping[str, ReadyWeight],
    group: Group,
    max_length: int,
    *,
    kv_granularity: str | None = None,
    exact_sums: bool | None = None,
) -> Decoder:
    """One rank's decoder.

    Args:
        table: the tensors' placements; says which are whole on every rank.
        weights: this rank's parameters (parallel/model/parameters.py) and its lm_head, also a tied
            one; floats in the compute dtype, products as a kernel packed them.
        group: the ranks that share the model.
        max_length: the longest sequence in tokens.
        kv_granularity: of an int8 KV cache; per_channel wants the scales among the weights.
        exact_sums: as for RowParallelLinear.
    """
    parts = _Parts(config, table, weights, group, exact_sums)
    return Decoder(
        config,
        group,
        parts.embedding(),
        [parts.layer(index) for index in range(config.num_hidden_layers)],
        parts.norm("model.norm"),
        parts.head(),
        num_local_kv_heads=parts.num_local_kv_heads(),
        max_length=max_length,
        kv_granularity=kv_granularity,
        kv_scales=parts.kv_scales() if kv_granularity == "per_channel" else (),
    )


@dataclass(frozen=True)
class _Parts:
    config: ModelConfig
    table: Table
    weights: Mapping[str, ReadyWeight]
    group: Group
    exact_sums: bool | None

    def embedding(self) -> VocabParallelEmbedding:
        rows = self.table[EMBEDDING].index(self.group.rank, self.group.size)[0]
        is_whole = rows == slice(0, self.config.vocab_size)
        return VocabParallelEmbedding(
            self._tensor(EMBEDDING), rows.start, None if is_whole else self.group
        )

    def head(self) -> VocabParallelHead:
        return VocabParallelHead(
            self.weights[HEAD], head_sizes(self.config, self.group.size), self.group
        )

    def layer(self, index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}."
        return DecoderLayer(
            self.norm(prefix + "input_layernorm"),
            Attention(
                index,
                self.config.head_dim,
                self._columns(prefix, "self_attn.qkv_proj"),
                self._row(prefix + "self_attn.o_proj"),
                window=self.config.windows[index],
                head_norm=self.head_norm(prefix + "self_attn."),
            ),
            self.norm(prefix + "post_attention_layernorm"),
            MLP(self._columns(prefix, "mlp.gate_up_proj"), self._row(prefix + "mlp.down_proj")),
        )

    def norm(self, path: str) -> RMSNorm:
        return RMSNorm(self._tensor(path + ".weight"), self.config.rms_norm_eps)

    def head_norm(self, prefix: str) -> HeadNorm | None:
        if not self.config.qk_norm:
            return None
        q_weight_C, k_weight_C = (self._tensor(f"{prefix}{name}.weight") for name in HEAD_NORMS)
        return HeadNorm(q_weight_C, k_weight_C, self.config.rms_norm_eps)

    def num_local_kv_heads(self) -> int:
        return self._local_size("model.layers.0.self_attn.k_proj") // self.config.head_dim

    def kv_scales(self) -> list[StaticScales]:
        """Of each layer's keys and values, those of this rank's kv heads, [H, C]."""
        return [
            (self._kv_scale(index, KV_SCALES[0]), self._kv_scale(index, KV_SCALES[1]))
            for index in range(self.config.num_hidden_layers)
        ]

    def _kv_scale(self, index: int, name: str) -> Tensor:
        return self._tensor(f"model.layers.{index}.{name}").view(-1, self.config.head_dim)

    def _columns(self, prefix: str, fused: str) -> ColumnParallelLinears:
        return ColumnParallelLinears(
            ColumnParallelLinear(
                self.weights[prefix + fused + ".weight"], self._bias(prefix + fused)
            ),
            tuple(self._local_size(prefix + part) for part in FUSED[fused]),
        )

    def _local_size(self, path: str) -> int:
        """Output channels of a column-parallel linear on this rank."""
        index = self.table[path + ".weight"].index(self.group.rank, self.group.size)
        return index_shape(index)[0]

    def _row(self, path: str) -> RowParallelLinear:
        return RowParallelLinear(
            self.weights[path + ".weight"], self._bias(path), self.group, self.exact_sums
        )

    def _bias(self, path: str) -> Tensor | None:
        return self._tensor(path + ".bias") if path + ".bias" in self.weights else None

    def _tensor(self, name: str) -> Tensor:
        weight = self.weights[name]
        assert isinstance(weight, Tensor), f"{name} is never quantized"
        return weight
