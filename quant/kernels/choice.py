"""Which kernels work here, and whether they are exact.

Every path that is offered automatically gives the same bits, so the choice changes nothing but the
time, which survey.py takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quant.activations import row_amax
from quant.errors import QuantError
from quant.kernels import Kernel
from quant.kernels.native import NativeKernel
from quant.kernels.onednn import OneDnnKernel
from quant.kernels.reference import ReferenceKernel
from quant.numeric import Grid
from quant.packing import has_product
from quant.scheme import LinearScheme
from quant.weight import PackedWeight, QuantizedWeight

# In the order in which they are preferred where they are equally fast.
KERNELS: Mapping[str, Callable[[], Kernel]] = {
    "native": NativeKernel,
    "onednn": OneDnnKernel,
    "reference": ReferenceKernel,
}
# Of static activations: those that move their range by the most, 0 to 255 and -255 to 0.
_ZERO_POINTS = (-128, 127)
ALL_SCHEMES = tuple(
    LinearScheme(weight_dtype, group_size, activation_dtype)
    for weight_dtype in ("int8", "int4")
    for group_size in (None, 32, 64, 128)
    for activation_dtype in ("int8", None)
)
# Has a zero point in some checkpoints.
_ASYMMETRIC = LinearScheme("int8", None, "int8")


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
    schemes = [scheme for scheme in ALL_SCHEMES if has_product(kernel.name, scheme)]
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
