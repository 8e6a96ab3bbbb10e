"""How fast the kernels are that work here.

`python -m quant.kernels.survey` prints what it finds as JSON; the launcher runs it in a child process,
where an instruction that the processor lacks harms nobody, and keeps the answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.kernels import Kernel
from quant.kernels.choice import ALL_SCHEMES, KERNELS, problem
from quant.kernels.native import NativeKernel
from quant.linear import linear
from quant.numeric import Grid
from quant.packing import has_product
from quant.scheme import LinearScheme
from quant.weight import PackedWeight, QuantizedWeight

# Rows of the products that are timed: one sequence's decode, a batch's, a prompt's.
ROWS = (1, 8, 128)
# 16 MiB of int8 each; together more than a last-level cache. All that is timed is held at once: about
# half a gigabyte.
_SHAPE, _COPIES = (4096, 4096), 3
_REPEATS: Mapping[int, int] = {1: 12, 8: 9, 128: 3}
# A machine that is busy is not made busier: what is left then is timed once.
_BUDGET_S = 8.0

Product = Callable[[Tensor], Tensor]
# Milliseconds, by the number of rows.
Times = dict[str, float]
# A kernel and the label of a scheme, or _UNQUANTIZED and the dtype of weights.
Entry = tuple[str, str]
_UNQUANTIZED = "unquantized"
# What reads memory and does little else, in turn with the products: what they are held against.
_READ = ("memory", "read")
_READ_BYTES = 64 << 20


@dataclass(frozen=True)
class Contestant:
    """What is timed: products that differ in their weights alone, for activations of a dtype."""

    products: Sequence[Product]
    dtype: torch.dtype


def survey() -> dict[str, Any]:
    """What works here and how fast, as JSON values; times are the least of several, in milliseconds.

    `kernels`: for each name `problem`, `detail` and, where it works and is no fallback, `ms`: by
    scheme and number of rows. `unquantized`: the same of bfloat16 and float32 weights. `read_gb_s`:
    how fast memory was read meanwhile. `waited`: the share of the time that threads waited for a
    core that somebody else had; 0 where the system does not say.
    """
    start, waited = time.perf_counter(), _waited_s()
    problems = {name: problem(name) for name in KERNELS}
    timed = [name for name in KERNELS if problems[name] is None and name != "reference"]
    contestants = {
        (name, label): Contestant(_products(KERNELS[name](), scheme), torch.bfloat16)
        for name in timed
        for label, scheme in _stand_ins(name).items()
    }
    # Above, activations are bfloat16, whose 16 bits are the usual case of W8A16.
    contestants |= {
        (_UNQUANTIZED, str(dtype).removeprefix("torch.")): Contestant(_float_products(dtype), dtype)
        for dtype in (torch.bfloat16, torch.float32)
    }
    contestants[_READ] = Contestant([_read_of(torch.ones(_READ_BYTES // 4))], torch.float32)
    times = least_times(contestants, _BUDGET_S)
    return {
        "shape": list(_SHAPE),
        "computes_on_gpus": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
        "waited": (_waited_s() - waited) / (time.perf_counter() - start) / torch.get_num_threads(),
        "read_gb_s": _READ_BYTES / 1e6 / min(times[_READ].values()),
        "kernels": {
            name: {
                "problem": problems[name],
                "detail": _detail(name) if problems[name] is None else "",
                "ms": {
                    scheme.label: times[name, _stand_in(scheme).label]
                    for scheme in (_own_schemes(name) if name in timed else ())
                },
            }
            for name in KERNELS
        },
        "unquantized": {label: ms for (name, label), ms in times.items() if name == _UNQUANTIZED},
    }


def least_times(contestants: Mapping[Entry, Contestant], budget_s: float) -> dict[Entry, Times]:
    """How fast each of them is, all of them in turn: what slows the machine for a while slows them all.

    The least time, not the median: other work on the machine must not decide. The weights of one
    take turns too, so that each comes from memory and not from a cache.

    Args:
        budget_s: once it is spent, each number of rows that is left is timed once, without a first
            product that warms it up.
    """
    deadline = time.perf_counter() + budget_s
    found: dict[Entry, Times] = {entry: {} for entry in contestants}
    for rows in ROWS:
        inputs = {
            entry: torch.randn(rows, _SHAPE[1]).to(item.dtype)
            for entry, item in contestants.items()
        }
        for entry, item in contestants.items():
            if time.perf_counter() < deadline:
                item.products[0](inputs[entry])
        for turn in range(_REPEATS[rows]):
            for entry, item in contestants.items():
                start = time.perf_counter()
                if turn and start > deadline:
                    break
                item.products[turn % len(item.products)](inputs[entry])
                ms = 1e3 * (time.perf_counter() - start)
                found[entry][str(rows)] = min(ms, found[entry].get(str(rows), ms))
            if time.perf_counter() > deadline:
                break
    return found


def _waited_s() -> float:
    """Seconds that this process's threads could run and did not (Linux: sched-stats.rst), or 0."""
    total_ns = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):  # a thread that has ended
            total_ns += int(file.read_text().split()[1])
    return total_ns / 1e9


def _detail(name: str) -> str:
    kernel = KERNELS[name]()
    return kernel.instruction_set if isinstance(kernel, NativeKernel) else ""


def _own_schemes(name: str) -> list[LinearScheme]:
    return [scheme for scheme in ALL_SCHEMES if has_product(name, scheme)]


def _stand_in(scheme: LinearScheme) -> LinearScheme:
    """The scheme that is timed for this one: it has as many bits."""
    return replace(scheme, group_size=None if scheme.weight_dtype == "int8" else 128)


def _stand_ins(name: str) -> dict[str, LinearScheme]:
    """What is timed of a kernel, by label."""
    return {scheme.label: scheme for scheme in map(_stand_in, _own_schemes(name))}


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


def _read_of(data: Tensor) -> Product:
    return lambda _: data.sum()


def _product_of(weight: PackedWeight | Tensor) -> Product:
    return lambda x_MK: linear(x_MK, weight)


if __name__ == "__main__":
    print(json.dumps(survey()))
