"""GPTQ: a column's rounding error is made up for by the columns that are rounded after it.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(2022). Theirs takes the Cholesky factor of the inverse Hessian. Here the Hessian itself is factored
once, `H = L L^T` with the columns in reverse order: with e the errors of the columns that are done,
the best real value for column j is `w_j + sum_i e_i L_ij / L_jj`. The integers are the same (Chen et
al., "The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm", 2025; and
tests/test_methods.py), two inversions are saved, and nothing but H itself need be kept.

Rows are independent. They are cut into blocks of a fixed size, since the bits of a product may
depend on its number of rows; so the integers do not depend on who rounds which.

Shape suffixes: N out_features, K in_features in their reverse order of rounding, R rows of a block,
B columns of a block, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import QuantError
from quant.methods.layer import Rounded
from quant.numeric import Grid
from quant.rounding import weight_scale

# Columns whose errors wait until the block is done; the paper's.
BLOCK_COLUMNS = 128
# Rows of a Hessian that are moved at a time.
STRIP_ROWS = 128


@dataclass(frozen=True)
class GPTQArguments:
    """What `algorithm_args` may say.

    Attributes:
        damp_percent: this part of the mean of H's diagonal is added to the diagonal.
        desc_act: the columns of the largest inputs are rounded first.
        static_groups: the scales of groups are those of the weight as it was before; else those of
            the weight as it has become when its group's turn comes.
    """

    damp_percent: float = 0.01
    desc_act: bool = False
    static_groups: bool = False

    def check(self, grid: Grid) -> None:
        """Raise QuantError for what cannot be computed."""
        if not 0 < self.damp_percent <= 1:
            raise QuantError(
                "`quant.algorithm_args.damp_percent` must be above 0 and at most 1, but is "
                f"{self.damp_percent}; the default is 0.01."
            )
        if self.desc_act and grid.group_size is not None and not self.static_groups:
            raise QuantError(
                "`quant.algorithm_args.desc_act` must be false where groups have scales of their own "
                "time, but is true; set static_groups too, or group_size to null."
            )


@dataclass(frozen=True)
class Factor:
    """A factored Hessian.

    Attributes:
        order_K: the columns in reverse order of rounding.
        lower_KK: L, whose memory was the Hessian's; values above the diagonal mean nothing.
    """

    order_K: Tensor
    lower_KK: Tensor


def factor(hessian_KK: Tensor, arguments: GPTQArguments) -> Factor:
    """Factor a Hessian in its own memory; beside it stands, for a moment, one more of its size.

    Args:
        hessian_KK: float32, its lower triangle; overwritten.

    Raises:
        QuantError: it is not positive definite even with its damping.
    """
    _mirror(hessian_KK)
    diagonal_K = hessian_KK.diagonal()
    # A column whose input is always zero may have any error; it must not spoil the others.
    diagonal_K[diagonal_K == 0] = 1.0
    diagonal_K += arguments.damp_percent * diagonal_K.mean()
    order_K = _order(diagonal_K, arguments)
    _reorder(hessian_KK, order_K)
    # LAPACK's matrices are column by column: the transpose of a symmetric one is factored in place.
    info = torch.empty(0, dtype=torch.int32)
    lower_KK = hessian_KK.T
    torch.linalg.cholesky_ex(lower_KK, out=(lower_KK, info))
    if int(info) != 0 or not bool(lower_KK.diagonal().isfinite().all()):
        raise QuantError(
            "`quant.algorithm_args.damp_percent` must make every Hessian positive definite, but "
            f"{arguments.damp_percent} does not; raise it, or calibrate on more text."
        )
    return Factor(order_K, lower_KK)


def round_rows(
    weight_RK: Tensor,
    factor: Factor,
    grid: Grid,
    scale_dtype: torch.dtype,
    arguments: GPTQArguments,
) -> Rounded:
    """Round one block of rows.

    Args:
        weight_RK: float32, columns in their own order.
        factor: of the Hessian of the product's input.
        scale_dtype: of the stored scale, which the integers are computed from.

    Raises:
        ValueError: the weight holds an infinity or a NaN.
    """
    if not weight_RK.isfinite().all():
        raise ValueError("the weight holds an infinity or a NaN")
    rounding = _Rounding(weight_RK, factor, grid, scale_dtype, arguments)
    return rounding.run()


class _Rounding:
    """The state of one block of rows; columns are the first dimension, so that each is contiguous."""

    def __init__(
        self,
        weight_RK: Tensor,
        factor: Factor,
        grid: Grid,
        scale_dtype: torch.dtype,
        arguments: GPTQArguments,
    ) -> None:
        self.order_K, self.lower_KK = factor.order_K, factor.lower_KK
        self.grid, self.scale_dtype = grid, scale_dtype
        self.num_columns = weight_RK.shape[1]
        self._group_size = grid.group_size or self.num_columns
        self.weight_KR = weight_RK.T[self.order_K]
        self.error_KR = torch.zeros_like(self.weight_KR)
        self.values_KR = torch.empty(self.weight_KR.shape, dtype=torch.int8)
        self.is_static = grid.group_size is None or arguments.static_groups
        self.scale_RG = weight_scale(weight_RK, grid, scale_dtype)

    def run(self) -> Rounded:
        for columns in self._column_blocks():
            self._round_block(columns)
        values_RK = torch.empty(self.values_KR.shape[::-1], dtype=torch.int8)
        values_RK[:, self.order_K] = self.values_KR.T
        return Rounded(values_RK, self.scale_RG, self.grid.group_size)

    def _column_blocks(self) -> list[slice]:
        """Positions, the last first; a group whose scale comes late is a block of its own."""
        size = BLOCK_COLUMNS if self.is_static else self.grid.group_size or BLOCK_COLUMNS
        stops = range(self.num_columns, 0, -size)
        return [slice(max(0, stop - size), stop) for stop in stops]

    def _round_block(self, columns: slice) -> None:
        later = slice(columns.stop, None)
        diagonal_B1 = self.lower_KK.diagonal()[columns, None]
        lower_BB = self.lower_KK[columns, columns] / diagonal_B1.T
        # What the columns that are done have left over, for the whole block at once.
        carried_BR = self.lower_KK[later, columns].T @ self.error_KR[later] / diagonal_B1
        best_BR = self.weight_KR[columns] + carried_BR
        if not self.is_static:
            self._set_late_scale(columns, lower_BB, carried_BR)
        scale_BR = self._scales(columns)
        error_BR = torch.zeros_like(best_BR)
        values_BR = self.values_KR[columns]
        for j in range(len(best_BR) - 1, -1, -1):
            wanted_R = torch.addmv(best_BR[j], error_BR[j + 1 :].T, lower_BB[j + 1 :, j])
            q_R = (wanted_R / scale_BR[j]).round_().clamp_(self.grid.lowest, self.grid.highest)
            values_BR[j] = q_R
            torch.sub(self.weight_KR[columns.start + j], q_R * scale_BR[j], out=error_BR[j])
        self.error_KR[columns] = error_BR

    def _set_late_scale(self, columns: slice, lower_BB: Tensor, carried_BR: Tensor) -> None:
        """The scale of a group, of its weights as they would be with nothing more to round.

        `best` takes the columns of the block before its own for exact; here they move as well, so
        that what each has to carry is solved for together.
        """
        groups_B = self.order_K[columns] // self._group_size
        assert bool((groups_B == groups_B[0]).all()), "a block is a group"
        moves_BR = torch.linalg.solve_triangular(
            lower_BB.T, carried_BR, upper=True, unitriangular=True
        )
        moved_BR = self.weight_KR[columns] + moves_BR
        self.scale_RG[:, groups_B[:1]] = weight_scale(
            moved_BR.T, Grid(self.grid.bits), self.scale_dtype
        )

    def _scales(self, columns: slice) -> Tensor:
        """float32 [B, R]: the stored scale of each column of the block."""
        groups_B = self.order_K[columns] // self._group_size
        return self.scale_RG.float()[:, groups_B].T.contiguous()


def _order(diagonal_K: Tensor, arguments: GPTQArguments) -> Tensor:
    """The columns in reverse order of rounding."""
    if arguments.desc_act:
        return diagonal_K.argsort(descending=True, stable=True).flip(0)
    return torch.arange(len(diagonal_K)).flip(0)


def _mirror(hessian_KK: Tensor) -> None:
    """Fill the upper triangle from the lower one."""
    for start in range(0, len(hessian_KK), STRIP_ROWS):
        strip = slice(start, start + STRIP_ROWS)
        square = hessian_KK[strip, strip]
        square.copy_(square.tril() + square.tril(-1).T)
        hessian_KK[strip, start + STRIP_ROWS :] = hessian_KK[start + STRIP_ROWS :, strip].T


def _reorder(hessian_KK: Tensor, order_K: Tensor) -> None:
    """Rows and columns in another order, in place but for one copy."""
    moved_KK = hessian_KK[order_K]
    for start in range(0, len(hessian_KK), STRIP_ROWS):
        strip = slice(start, start + STRIP_ROWS)
        hessian_KK[strip] = moved_KK[strip][:, order_K]
