"""How fast the kernels are that work here.

`python -m quant.kernels.survey` prints what it finds as JSON; the launcher runs it in a child process,
where an instruction that the processor lacks harms nobody, and keeps the answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant.kernels import Kernel, has_product
from quant.kernels.choice import ALL_SCHEMES, KERNELS, problem
from quant.kernels.native import NativeKernel
from quant.linear import linear
from quant.numeric import Grid
from quant.scheme import LinearScheme
from quant.weight import PackedWeight, QuantizedWeight

# Rows of the products that are timed: one sequence's decode, a batch's, a prompt's.
ROWS = (1, 8, 128)
# 16 MiB of int8 each; together more than a last-level cache.
_SHAPE, _COPIES = (4096, 4096), 3
_REPEATS: Mapping[int, int] = {1: 12, 8: 9, 128: 3}
# A machine that is busy is not made busier: what is left then is timed once.
_BUDGET_S = 20.0

Product = Callable[[Tensor], Tensor]
# Milliseconds, by the number of rows.
Times = dict[str, float]


def survey() -> dict[str, Any]:
    """What works here and how fast, as JSON values; times are the least of several, in milliseconds.

    `kernels`: for each name `problem`, `detail` and, where it works and is no fallback, `ms`: by
    scheme and number of rows. `unquantized`: the same of bfloat16 and float32 weights.
    """
    watch = Stopwatch(_BUDGET_S)
    problems = {name: problem(name) for name in KERNELS}
    timed = [name for name in KERNELS if problems[name] is None and name != "reference"]
    return {
        "shape": list(_SHAPE),
        "computes_on_gpus": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
        "kernels": {
            name: {
                "problem": problems[name],
                "detail": _detail(name) if problems[name] is None else "",
                "ms": _time_schemes(KERNELS[name](), watch) if name in timed else {},
            }
            for name in KERNELS
        },
        "unquantized": {
            str(dtype).removeprefix("torch."): watch.times(_float_products(dtype), dtype)
            for dtype in (torch.bfloat16, torch.float32)
        },
    }


class Stopwatch:
    """Times products, several times each until its budget is spent, then once.

    Args:
        budget_s: seconds from now.
    """

    def __init__(self, budget_s: float) -> None:
        self._deadline = time.perf_counter() + budget_s

    def times(self, products: Sequence[Product], dtype: torch.dtype) -> Times:
        """Of `products`, which differ in their weights alone, for activations of `dtype`."""
        return {str(rows): self._least_ms(products, rows, dtype) for rows in ROWS}

    def _least_ms(self, products: Sequence[Product], rows: int, dtype: torch.dtype) -> float:
        """The weights take turns, so that each comes from memory and not from a cache.

        The least time, not the median: other work on the machine must not decide.
        """
        x_MK = torch.randn(rows, _SHAPE[1]).to(dtype)
        products[0](x_MK)
        times = []
        for turn in range(_REPEATS[rows]):
            start = time.perf_counter()
            products[turn % len(products)](x_MK)
            end = time.perf_counter()
            times.append(end - start)
            if end > self._deadline:
                break
        return 1e3 * min(times)


def _detail(name: str) -> str:
    kernel = KERNELS[name]()
    return kernel.instruction_set if isinstance(kernel, NativeKernel) else ""


def _time_schemes(kernel: Kernel, watch: Stopwatch) -> dict[str, Times]:
    """By the labels of all schemes that the kernel has products for."""
    products = [scheme for scheme in ALL_SCHEMES if has_product(kernel.name, scheme)]
    stand_ins = dict.fromkeys(map(_stand_in, products))
    # Activations are bfloat16, whose 16 bits are the usual case of W8A16.
    times = {item: watch.times(_products(kernel, item), torch.bfloat16) for item in stand_ins}
    return {scheme.label: times[_stand_in(scheme)] for scheme in products}


def _stand_in(scheme: LinearScheme) -> LinearScheme:
    """The scheme that is timed for this one: it has as many bits."""
    return replace(scheme, group_size=None if scheme.weight_dtype == "int8" else 128)


def _products(kernel: Kernel, scheme: LinearScheme) -> list[Product]:
    return [_product_of(kernel.pack(_random_weight(scheme))) for _ in range(_COPIES)]


def _random_weight(scheme: LinearScheme) -> QuantizedWeight:
    grid = Grid(scheme.bits, scheme.group_size)
    values_NK = torch.randint(grid.lowest, grid.highest + 1, _SHAPE, dtype=torch.int8)
    return QuantizedWeight(
        values_NK,
        torch.ones(_SHAPE[0], grid.num_groups(_SHAPE[1])),
        scheme.activation_dtype,
        scheme.bits,
        scheme.group_size,
    )


def _float_products(dtype: torch.dtype) -> list[Product]:
    return [_product_of(torch.zeros(_SHAPE, dtype=dtype)) for _ in range(_COPIES)]


def _product_of(weight: PackedWeight | Tensor) -> Product:
    return lambda x_MK: linear(x_MK, weight)


if __name__ == "__main__":
    print(json.dumps(survey()))
