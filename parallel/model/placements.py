"""The table of a model's tensors: name, global shape, and placement, each declared once.

The byte counts of `plan`, the slices that `prepare` writes, and the slices that a rank loads all
come from these rows. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from parallel.model.config import ModelConfig
from parallel.placement import Index, Placement, Replicate, Shape, Split, SplitKVHeads
from quant.scheme import LinearScheme


@dataclass(frozen=True)
class Row:
    """One tensor of the checkpoint.

    Attributes:
        name: its name in a Hugging Face checkpoint.
        shape: its global shape.
        placement: which slice belongs to a rank.
        is_linear: whether it is the weight of a linear, which may be quantized.
        twin: the tensor it is a copy of, where the checkpoint has none of that name.
        is_kv_scale: whether it is the static scales of an int8 KV cache, which stay float32.
    """

    name: str
    shape: Shape
    placement: Placement
    is_linear: bool = False
    twin: str | None = None
    is_kv_scale: bool = False

    @property
    def module(self) -> str:
        """The path of the module that owns the tensor: the name without `.weight` or `.bias`."""
        return self.name.rpartition(".")[0]

    def index(self, rank: int, size: int) -> Index:
        return self.placement.index(self.shape, rank, size)


Table = dict[str, Row]


EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# The norms of each head of q and of k, where a family has them.
HEAD_NORMS = ("q_norm", "k_norm")
# Static scales of a layer's keys and values, one of each channel, by the names of compressed-tensors.
KV_SCALES = ("self_attn.k_scale", "self_attn.v_scale")


def placement_table(
    config: ModelConfig,
    *,
    vocab_emb_dp: bool = False,
    own_head: bool = False,
    schemes: Mapping[str, LinearScheme | None] | None = None,
    has_kv_scales: bool = False,
) -> Table:
    """Every tensor of the model by name, in the order of a step.

    Args:
        vocab_emb_dp: the embedding is whole on every rank (the name is MindFormers').
        own_head: a tied lm_head gets a copy of its own, because it is quantized and the embedding
            never is.
        schemes: of the modules that are quantized; an FFN is cut between the groups of its
            down_proj.
        has_kv_scales: the KV cache is int8 with static scales, which calibration has made.
    """
    rows = [*_embedding(config, vocab_emb_dp)]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        rows += _layer(config, prefix, schemes or {})
        rows += _kv_scales(config, prefix) if has_kv_scales else ()
    rows.append(Row("model.norm.weight", (config.hidden_size,), Replicate()))
    if own_head or not config.tie_word_embeddings:
        shape = (config.vocab_size, config.hidden_size)
        twin = EMBEDDING if config.tie_word_embeddings else None
        rows.append(Row(HEAD, shape, Split(0), is_linear=True, twin=twin))
    table = {row.name: row for row in rows}
    assert len(table) == len(rows), "two rows with one name"
    return table


def linear_modules(config: ModelConfig) -> list[str]:
    """The modules that quantization may convert; `lm_head` is one of them also when it is tied."""
    table = placement_table(config, own_head=True)
    return [row.module for row in table.values() if row.is_linear]


def head_sizes(config: ModelConfig, size: int) -> tuple[int, ...]:
    """How many token ids of the vocabulary each rank's lm_head holds."""
    cuts = [Split(0).index((config.vocab_size,), rank, size)[0] for rank in range(size)]
    return tuple(cut.stop - cut.start for cut in cuts)


def _embedding(config: ModelConfig, vocab_emb_dp: bool) -> Iterator[Row]:
    placement: Placement = Replicate() if vocab_emb_dp else Split(0)
    shape = (config.vocab_size, config.hidden_size)
    yield Row(EMBEDDING, shape, placement)


def _layer(
    config: ModelConfig, prefix: str, schemes: Mapping[str, LinearScheme | None]
) -> Iterator[Row]:
    yield Row(prefix + "input_layernorm.weight", (config.hidden_size,), Replicate())
    yield from _attention(config, prefix + "self_attn.")
    yield Row(prefix + "post_attention_layernorm.weight", (config.hidden_size,), Replicate())
    unit = _ffn_unit(schemes.get(prefix + "mlp.down_proj"))
    yield from _mlp(config, prefix + "mlp.", unit)


def _attention(config: ModelConfig, prefix: str) -> Iterator[Row]:
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    heads = Split(0, config.head_dim)
    kv_heads = SplitKVHeads(0, config.num_key_value_heads)
    bias = config.qkv_bias
    yield from _column(prefix + "q_proj", q_size, config.hidden_size, heads, bias)
    yield from _column(prefix + "k_proj", kv_size, config.hidden_size, kv_heads, bias)
    yield from _column(prefix + "v_proj", kv_size, config.hidden_size, kv_heads, bias)
    for name in HEAD_NORMS if config.qk_norm else ():
        yield Row(f"{prefix}{name}.weight", (config.head_dim,), Replicate())
    cut = Split(1, config.head_dim)
    yield from _row(prefix + "o_proj", config.hidden_size, q_size, cut, config.o_bias)


def _kv_scales(config: ModelConfig, prefix: str) -> Iterator[Row]:
    """Cut as the rows of k_proj and v_proj are, so that a rank has those of its own kv heads."""
    heads = SplitKVHeads(0, config.num_key_value_heads)
    for name in KV_SCALES:
        shape = (config.num_key_value_heads * config.head_dim,)
        yield Row(prefix + name, shape, heads, is_kv_scale=True)


def _ffn_unit(down_proj: LinearScheme | None) -> int:
    """Neurons that stay together: a group of down_proj's columns, or those of a packed byte."""
    if down_proj is None:
        return 1
    return down_proj.group_size or down_proj.values_per_byte


def _mlp(config: ModelConfig, prefix: str, unit: int) -> Iterator[Row]:
    """gate and up are cut at the neurons at which down is."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    for name in ("gate_proj", "up_proj"):
        yield from _column(prefix + name, ffn, hidden, Split(0, unit), config.mlp_bias)
    yield from _row(prefix + "down_proj", hidden, ffn, Split(1, unit), config.mlp_bias)


def _column(path: str, out: int, into: int, placement: Placement, bias: bool) -> Iterator[Row]:
    """A column-parallel linear: its bias is cut as its weight's rows are."""
    yield Row(path + ".weight", (out, into), placement, is_linear=True)
    if bias:
        yield Row(path + ".bias", (out,), placement)


def _row(path: str, out: int, into: int, placement: Placement, bias: bool) -> Iterator[Row]:
    """A row-parallel linear: its bias is whole on every rank and added after the reduction."""
    yield Row(path + ".weight", (out, into), placement, is_linear=True)
    if bias:
        yield Row(path + ".bias", (out,), Replicate())
