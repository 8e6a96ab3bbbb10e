"""Which kernels work here, whether they are exact, and how fast they are.

Every path that is offered automatically gives the same bits, so the choice changes nothing but the
time. `python -m quant.kernels.choice` prints what it finds as JSON; the launcher runs it in a child
process, where an instruction that the processor lacks harms nobody, and keeps the answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant.activations import row_amax
from quant.errors import QuantError
from quant.kernels import Kernel, has_product
from quant.kernels.native import NativeKernel
from quant.kernels.onednn import OneDnnKernel
from quant.kernels.reference import ReferenceKernel
from quant.linear import linear
from quant.numeric import Grid
from quant.scheme import LinearScheme
from quant.weight import PackedWeight, QuantizedWeight

# In the order in which they are preferred where they are equally fast.
KERNELS: Mapping[str, Callable[[], Kernel]] = {
    "native": NativeKernel,
    "onednn": OneDnnKernel,
    "reference": ReferenceKernel,
}
_ACTIVATIONS = ("int8", None)
# Of static activations: those that move their range by the most, 0 to 255 and -255 to 0.
_ZERO_POINTS = (-128, 127)
_ALL_SCHEMES = tuple(
    LinearScheme(weight_dtype, group_size, activation_dtype)
    for weight_dtype in ("int8", "int4")
    for group_size in (None, 32, 64, 128)
    for activation_dtype in _ACTIVATIONS
)
# Has a zero point in some checkpoints.
_ASYMMETRIC = LinearScheme("int8", None, "int8")
# The schemes that are timed, where a kernel has a product for them; others have the times of those
# that are most like them.
SCHEMES: Mapping[str, LinearScheme] = {
    scheme.label: scheme
    for weight_dtype, group_size in (("int8", None), ("int4", 128))
    for activation_dtype in _ACTIVATIONS
    for scheme in [LinearScheme(weight_dtype, group_size, activation_dtype)]
}
# Rows of the products that are timed: one sequence's decode, a batch's, a prompt's.
ROWS = (1, 8, 128)
# 16 MiB of int8 each; together more than a last-level cache.
_SHAPE, _COPIES = (4096, 4096), 3
_REPEATS: Mapping[int, int] = {1: 12, 8: 9, 128: 3}
# A machine that is busy is not made busier: what is left then is timed once.
_BUDGET_S = 20.0


def open_kernel(name: str) -> Kernel:
    """The kernel of a name; `auto` is that of a job without quantized weights: any would do.

    Raises:
        QuantError: it is not there, or not exact on this processor.
    """
    if name == "auto":
        return ReferenceKernel()
    reason = problem(name)
    if reason:
        raise QuantError(
            f"`kernel` is {name}, which does not work here: {reason}; write kernel=reference."
        )
    return KERNELS[name]()


def problem(name: str) -> str | None:
    """Why a kernel cannot be used on this machine, or None."""
    try:
        kernel = KERNELS[name]()
        return None if is_exact(kernel) else "its int8 sums saturate on this processor"
    except OSError as error:
        return str(error)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"this torch does not offer it ({str(error).splitlines()[0][:100]})"


def is_exact(kernel: Kernel) -> bool:
    """Whether the largest products add up right: all 127 (255 unsigned) times all +-127 and -128.

    Of int4 and of groups likewise, where the kernel has products for them; and with zero points, which
    make static activations 0 to 255, or -255 to 0.
    """
    num_columns = 1024
    signs = torch.ones(2, num_columns)
    signs[1, ::2] = -1
    x_MK = torch.cat([signs, -signs, torch.linspace(-1, 1, num_columns)[None]])
    schemes = [scheme for scheme in _ALL_SCHEMES if has_product(kernel.name, scheme)]
    return all(
        _is_equal(kernel, weight, x_MK)
        for scheme in schemes
        for weight in _extreme_weights(scheme, num_columns)
    )


def _extreme_weights(scheme: LinearScheme, num_columns: int) -> Iterator[QuantizedWeight]:
    """The highest values, the lowest, the lowest but one, and all of them in turn."""
    grid = Grid(scheme.bits, scheme.group_size)
    shape = (64, num_columns)
    turns = torch.arange(64 * num_columns).remainder(2**scheme.bits) + grid.lowest
    values = [torch.full(shape, value) for value in (grid.highest, -grid.highest, grid.lowest)]
    scale_NG = torch.ones(64, grid.num_groups(num_columns))
    for value in (*values, turns.view(shape)):
        weight = QuantizedWeight(
            value.to(torch.int8), scale_NG, scheme.activation_dtype, scheme.bits, scheme.group_size
        )
        yield weight
        if scheme == _ASYMMETRIC:
            for zero_point in _ZERO_POINTS:
                scale = torch.tensor([2.0**-8])
                yield replace(weight, input_scale=scale, input_zero_point=zero_point)


def _is_equal(kernel: Kernel, weight: QuantizedWeight, x_MK: Tensor) -> bool:
    packed, exact = kernel.pack(weight), ReferenceKernel().pack(weight)
    return torch.equal(_sums(packed, x_MK), _sums(exact, x_MK)) and torch.equal(
        packed.linear(x_MK, None, torch.float32), exact.linear(x_MK, None, torch.float32)
    )


def _sums(packed: PackedWeight, x_MK: Tensor) -> Tensor:
    if packed.input_scale is not None:
        return packed.static_sums(x_MK)
    return packed.sums(x_MK, row_amax(x_MK))


def survey() -> dict[str, Any]:
    """What works here and how fast, as JSON values; times are the least of several, in milliseconds.

    `kernels`: for each name `problem`, `detail` and, where it works and is no fallback, `ms`: by
    scheme and number of rows. `unquantized`: the same of bfloat16 and float32 weights.
    """
    deadline = time.perf_counter() + _BUDGET_S
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
                "ms": _time_schemes(KERNELS[name](), deadline) if name in timed else {},
            }
            for name in KERNELS
        },
        "unquantized": {
            str(dtype).removeprefix("torch."): _time_rows(_float_products(dtype), dtype, deadline)
            for dtype in (torch.bfloat16, torch.float32)
        },
    }


def _detail(name: str) -> str:
    kernel = KERNELS[name]()
    return kernel.instruction_set if isinstance(kernel, NativeKernel) else ""


def _time_schemes(kernel: Kernel, deadline: float) -> dict[str, dict[str, float]]:
    """By the labels of all schemes that the kernel has products for."""
    products = [scheme for scheme in _ALL_SCHEMES if has_product(kernel.name, scheme)]
    labels = _labels_timed(products)
    times = {label: _time_scheme(kernel, SCHEMES[label], deadline) for label in labels}
    return {scheme.label: times[_label_timed(scheme)] for scheme in products}


def _labels_timed(schemes: Sequence[LinearScheme]) -> list[str]:
    return [label for label in SCHEMES if label in map(_label_timed, schemes)]


def _label_timed(scheme: LinearScheme) -> str:
    """Of the scheme that stands for this one: it has as many bits."""
    group_size = None if scheme.weight_dtype == "int8" else 128
    return replace(scheme, group_size=group_size).label


def _time_scheme(kernel: Kernel, scheme: LinearScheme, deadline: float) -> dict[str, float]:
    """Activations are bfloat16, whose 16 bits are the usual case of W8A16."""
    weights = [kernel.pack(_random_weight(scheme)) for _ in range(_COPIES)]
    return _time_rows(
        [lambda x_MK, weight=weight: linear(x_MK, weight) for weight in weights],  # type: ignore[misc]
        torch.bfloat16,
        deadline,
    )


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


def _float_products(dtype: torch.dtype) -> list[Callable[[Tensor], Tensor]]:
    weights = [torch.zeros(_SHAPE, dtype=dtype) for _ in range(_COPIES)]
    return [lambda x_MK, weight=weight: linear(x_MK, weight) for weight in weights]  # type: ignore[misc]


def _time_rows(
    products: Sequence[Callable[[Tensor], Tensor]], dtype: torch.dtype, deadline: float
) -> dict[str, float]:
    return {str(rows): _least_ms(products, rows, dtype, deadline) for rows in ROWS}


def _least_ms(
    products: Sequence[Callable[[Tensor], Tensor]], rows: int, dtype: torch.dtype, deadline: float
) -> float:
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
        if end > deadline:
            break
    return 1e3 * min(times)


if __name__ == "__main__":
    print(json.dumps(survey()))
