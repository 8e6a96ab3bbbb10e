"""Put one rank's weights, by checkpoint name, into the layers of a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from parallel.group import Group
from parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from parallel.model.config import ModelConfig
from parallel.model.decoder import MLP, Attention, Decoder, DecoderLayer, RMSNorm
from parallel.model.placements import EMBEDDING, HEAD, Table, head_sizes
from parallel.placement import Split
from quant.weight import Weight


def build_decoder(
    config: ModelConfig,
    table: Table,
    weights: Mapping[str, Weight],
    group: Group,
    max_length: int,
) -> Decoder:
    """One rank's decoder.

    Args:
        table: the tensors' placements; says which are whole on every rank.
        weights: this rank's slice of each tensor, floats in the compute dtype.
        group: the ranks that share the model.
        max_length: the longest sequence in tokens.
    """
    parts = _Parts(config, table, weights, group)
    return Decoder(
        config,
        group,
        parts.embedding(),
        [parts.layer(index) for index in range(config.num_hidden_layers)],
        parts.norm("model.norm"),
        parts.head(),
        num_local_kv_heads=parts.num_local_kv_heads(),
        max_length=max_length,
    )


@dataclass(frozen=True)
class _Parts:
    config: ModelConfig
    table: Table
    weights: Mapping[str, Weight]
    group: Group

    def embedding(self) -> VocabParallelEmbedding:
        rows = self.table[EMBEDDING].index(self.group.rank, self.group.size)[0]
        is_whole = rows == slice(0, self.config.vocab_size)
        return VocabParallelEmbedding(
            self._tensor(EMBEDDING), rows.start, None if is_whole else self.group
        )

    def head(self) -> VocabParallelHead:
        sizes = head_sizes(self.config, self.group.size)
        return VocabParallelHead(self._head_weight(), sizes, self.group)

    def layer(self, index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}."
        return DecoderLayer(
            self.norm(prefix + "input_layernorm"),
            self._attention(index, prefix + "self_attn."),
            self.norm(prefix + "post_attention_layernorm"),
            self._mlp(prefix + "mlp."),
        )

    def norm(self, path: str) -> RMSNorm:
        return RMSNorm(self._tensor(path + ".weight"), self.config.rms_norm_eps)

    def num_local_kv_heads(self) -> int:
        weight = self.weights["model.layers.0.self_attn.k_proj.weight"]
        return weight.shape[0] // self.config.head_dim

    def _attention(self, index: int, prefix: str) -> Attention:
        return Attention(
            index,
            self.config.head_dim,
            self._column(prefix + "q_proj"),
            self._column(prefix + "k_proj"),
            self._column(prefix + "v_proj"),
            self._row(prefix + "o_proj"),
        )

    def _mlp(self, prefix: str) -> MLP:
        return MLP(
            self._column(prefix + "gate_proj"),
            self._column(prefix + "up_proj"),
            self._row(prefix + "down_proj"),
        )

    def _head_weight(self) -> Weight:
        """A tied head is this rank's rows of the embedding: a view, also of a whole one."""
        if HEAD in self.weights:
            return self.weights[HEAD]
        embedding = self._tensor(EMBEDDING)
        if embedding.shape[0] != self.config.vocab_size:
            return embedding
        shape = (self.config.vocab_size, self.config.hidden_size)
        return embedding[Split(0).index(shape, self.group.rank, self.group.size)[0]]

    def _column(self, path: str) -> ColumnParallelLinear:
        return ColumnParallelLinear(self.weights[path + ".weight"], self._bias(path))

    def _row(self, path: str) -> RowParallelLinear:
        return RowParallelLinear(self.weights[path + ".weight"], self._bias(path), self.group)

    def _bias(self, path: str) -> Tensor | None:
        return self._tensor(path + ".bias") if path + ".bias" in self.weights else None

    def _tensor(self, name: str) -> Tensor:
        weight = self.weights[name]
        assert isinstance(weight, Tensor), f"{name} is never quantized"
        return weight
