"""Column-, row- and vocab-parallel layers; each is handed its group.

Shapes: M rows (tokens), K in_features, N out_features, V vocabulary, D hidden. `local_` is one
rank's part. After Megatron-LM (Shoeybi et al., 2019): a column-parallel layer needs no collective,
the row-parallel layer that follows it needs one all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.group import Group
from quant.activations import most_int32_columns
from quant.elementwise import round_sums
from quant.linear import linear
from quant.weight import PackedWeight, ReadyWeight


@dataclass(frozen=True)
class ColumnParallelLinear:
    """`x @ W.T + b`, cut along out_features: [M, K] -> local [M, N / size]."""

    local_weight: ReadyWeight
    local_bias: Tensor | None = None

    def __call__(self, x_MK: Tensor) -> Tensor:
        return linear(x_MK, self.local_weight, self.local_bias)


@dataclass(frozen=True)
class ColumnParallelLinears:
    """Linears of the same input, such as q, k and v, as one product.

    Args:
        linear: the fused product.
        local_sizes: the out_features of each part on this rank.
    """

    linear: ColumnParallelLinear
    local_sizes: tuple[int, ...]

    def __call__(self, x_MK: Tensor) -> Tensor:
        """[M, sum of the local sizes]: the parts side by side."""
        return self.linear(x_MK)


@dataclass(frozen=True)
class RowParallelLinear:
    """`x @ W.T + b`, cut along in_features: local [M, K / size] -> [M, N] on every rank.

    Partial sums leave the rank in float32 and the bias is added once, after the reduction.

    Args:
        exact_sums: partial sums of a quantized weight leave as integers, of activations that were
            scaled by the whole row: the result is bit for bit that of one rank. It costs a further
            small all-reduce, of the rows' largest values. None: where activations are int8, whose
            rounding would otherwise differ from one number of ranks to the next; where these have a
            static scale, no rank needs to know the others' rows. Of grouped weights
            int8 activations are scaled by the whole row too, but what leaves are float32 sums of
            scaled groups, added in rank order; never true there.
    """

    local_weight: ReadyWeight
    bias: Tensor | None
    group: Group
    exact_sums: bool | None = None

    def __call__(self, local_x_MK: Tensor) -> Tensor:
        if self.group.size == 1:
            return linear(local_x_MK, self.local_weight, self.bias)
        if isinstance(self.local_weight, PackedWeight) and self._scales_whole_rows(
            self.local_weight
        ):
            return self._sum_of_whole_rows(local_x_MK, self.local_weight)
        partial_MN = linear(local_x_MK, self.local_weight, wide=True)
        return round_sums(self.group.all_reduce(partial_MN), self.bias, local_x_MK.dtype)

    def _scales_whole_rows(self, weight: PackedWeight) -> bool:
        assert not (self.exact_sums and weight.group_size), "sums of groups are no integers"
        return weight.activation_dtype == "int8" if self.exact_sums is None else self.exact_sums

    def _sum_of_whole_rows(self, local_x_MK: Tensor, weight: PackedWeight) -> Tensor:
        most_columns = most_int32_columns(weight.input_zero_point)
        assert weight.shape[1] * self.group.size <= most_columns or (
            weight.activation_dtype is None
        ), "the integer sums would not fit"
        if weight.input_scale is not None:
            static_sums = self.group.all_reduce(weight.static_sums(local_x_MK))
            return weight.finish_static(static_sums, self.bias, local_x_MK.dtype)
        amax_M = self.group.all_reduce(weight.row_amax(local_x_MK), "max")
        sums_MN = self.group.all_reduce(weight.sums(local_x_MK, amax_M))
        return weight.finish(sums_MN, amax_M, self.bias, local_x_MK.dtype, local_x_MK.dtype)


@dataclass(frozen=True)
class VocabParallelEmbedding:
    """Rows of the embedding, cut along the vocabulary or whole on every rank.

    Args:
        local_weight: [local V, D].
        start: the token id of the first local row.
        group: None where the embedding is whole on every rank: no collective then.
    """

    local_weight: Tensor
    start: int
    group: Group | None

    def __call__(self, token_ids_M: Tensor) -> Tensor:
        if self.group is None or self.group.size == 1:
            return F.embedding(token_ids_M, self.local_weight)
        local_ids_M = token_ids_M - self.start
        inside_M = (local_ids_M >= 0) & (local_ids_M < self.local_weight.shape[0])
        rows_MD = F.embedding(local_ids_M.where(inside_M, 0), self.local_weight)
        # One rank adds the row, the others add zeros: exact in any dtype.
        return self.group.all_reduce(rows_MD * inside_M.unsqueeze(-1))


@dataclass(frozen=True)
class VocabParallelHead:
    """Logits over a vocabulary that is cut over the ranks; whole on rank 0, which samples.

    Args:
        local_weight: [local V, D].
        local_sizes: how many token ids each rank holds, in rank order.
    """

    local_weight: ReadyWeight
    local_sizes: tuple[int, ...]
    group: Group

    def __call__(self, x_MD: Tensor) -> Tensor | None:
        """float32 logits [M, V] on rank 0, None elsewhere."""
        local_MV = linear(x_MD, self.local_weight).float()
        if self.group.size == 1:
            return local_MV
        missing = max(self.local_sizes) - local_MV.shape[1]
        parts = self.group.gather(F.pad(local_MV, (0, missing)) if missing else local_MV)
        if parts is None:
            return None
        return torch.cat(
            [part[:, :size] for part, size in zip(parts, self.local_sizes, strict=True)], dim=1
        )
