"""Perplexity of texts that no method has seen, before and after, as the layers go by.

They pass each layer twice, as it was and as it has become, so that neither model is ever in memory
as a whole: one layer and two residual streams are.

Shape suffixes: T tokens, D hidden, V vocabulary, R rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.calibration.forward import LayerForward
from parallel.calibration.read import embed
from parallel.calibration.samples import Threads
from parallel.checkpoint.layout import Layout
from parallel.checkpoint.shard import read_weight
from parallel.checkpoint.source import Source
from parallel.generation.loss import Loss
from parallel.generation.score import log_probs
from parallel.group import Group
from parallel.model.placements import EMBEDDING, HEAD
from quant.methods.layer import Layer
from quant.weight import QuantizedWeight

# Tokens whose logits are there at a time.
_CHUNK_TOKENS = 64


@dataclass(frozen=True)
class Perplexities:
    """Of the held-out texts: each scored from its second token on, with nothing before it."""

    before: Loss
    after: Loss

    @property
    def increase(self) -> float:
        """In percent of the original's."""
        return 100 * (self.after.perplexity / self.before.perplexity - 1)


@dataclass
class HeldOut:
    """A rank's share of the texts, text i on rank i modulo their number.

    Attributes:
        token_ids: of all texts, at least two tokens each.
        floats, rounded: the residual streams [T, D] of this rank's, in either model.
    """

    token_ids: Sequence[Sequence[int]]
    floats: dict[int, Tensor] = field(default_factory=dict)
    rounded: dict[int, Tensor] = field(default_factory=dict)

    def begin(self, source: Source, group: Group, dtype: torch.dtype) -> None:
        mine = range(group.rank, len(self.token_ids), group.size)
        self.floats = embed(source, {index: self.token_ids[index] for index in mine}, dtype)
        self.rounded = dict(self.floats)

    def pass_float(self, forward: LayerForward, threads: Threads, layer: Layer) -> None:
        self.floats = _pass(forward, threads, layer, self.floats)

    def pass_rounded(self, forward: LayerForward, threads: Threads, layer: Layer) -> None:
        self.rounded = _pass(forward, threads, layer, self.rounded)

    def to_tensors(self, first: int) -> dict[int, Tensor]:
        """Both streams by numbers from `first` on, which no sample has."""
        after = first + len(self.token_ids)
        floats = {first + index: tensor for index, tensor in self.floats.items()}
        return floats | {after + index: tensor for index, tensor in self.rounded.items()}

    def from_tensors(self, first: int, tensors: Mapping[int, Tensor]) -> None:
        after = first + len(self.token_ids)
        self.floats = {i - first: x for i, x in tensors.items() if first <= i < after}
        self.rounded = {i - after: x for i, x in tensors.items() if i >= after}

    def perplexities(
        self,
        layout: Layout,
        source: Source,
        group: Group,
        on_text: Callable[[], object] = lambda: None,
    ) -> Perplexities:
        """Once all layers have gone by; the same on every rank and on any number of them."""
        norm_D = source.read("model.norm.weight", (slice(0, layout.config.hidden_size),))
        nll_T2 = torch.zeros(len(self.token_ids), 2, dtype=torch.float64)
        for column, streams in enumerate((self.floats, self.rounded)):
            head = _head(layout, source, is_rounded=column == 1)
            for index, x_TD in streams.items():
                normed_TD = _norm(x_TD, norm_D, layout.config.rms_norm_eps)
                nll_T2[index, column] = _nll(normed_TD, head, self.token_ids[index])
                on_text()
        nll_T2 = group.all_reduce(nll_T2)  # exact: one rank has each text
        count = sum(len(ids) - 1 for ids in self.token_ids)
        before, after = (Loss(sum(column), count) for column in nll_T2.T.tolist())
        return Perplexities(before, after)


def _pass(
    forward: LayerForward, threads: Threads, layer: Layer, streams: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    found = threads.map(lambda x_TD: forward.run(layer, x_TD), streams.values())
    return dict(zip(streams, found, strict=True))


def _norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return weight_D.to(x_TD.dtype) * torch.rms_norm(x_TD, weight_D.shape, None, eps)


def _head(layout: Layout, source: Source, *, is_rounded: bool) -> Tensor:
    """The weight [V, D] of lm_head as either model has it, in its stored dtype or in float32."""
    row = layout.table.get(HEAD)
    if row is None:  # tied, and not quantized
        row = layout.table[EMBEDDING]
    whole = tuple(slice(0, length) for length in row.shape)
    if row.name in layout.schemes and is_rounded:
        weight = read_weight(layout, source, row, whole)
        assert isinstance(weight, QuantizedWeight)
        return weight.dequantize()
    return source.read(row.twin or row.name, whole)


def _nll(x_TD: Tensor, head_VD: Tensor, token_ids: Sequence[int]) -> float:
    """Minus the log-probability of every token but the first."""
    targets = token_ids[1:]
    total = 0.0
    for start in range(0, len(targets), _CHUNK_TOKENS):
        chunk = slice(start, min(start + _CHUNK_TOKENS, len(targets)))
        logits_TV = x_TD[chunk].float() @ head_VD.float().T
        total -= float(log_probs(logits_TV, targets[chunk]).sum())
    return total
