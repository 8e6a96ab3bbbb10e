"""The C library: products with int8 weights (int8.c says how they are exact on every processor) and
with bfloat16 ones, decode attention, and what lies between the products of a layer.

The library is compiled when the package is installed, where there is a C compiler; without it this
path is absent and the others do the work.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from quant.activations import num_levels
from quant.compiled import find_compiled
from quant.weight import PackedWeight, QuantizedWeight

BLOCK = 32  # as in int8.c
MAX_CHANNELS, MAX_GROUP = 256, 16  # as in attention.c
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2, torch.int64: 3}
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
# The functions of the library and their arguments; the C files say what they mean.
_FUNCTIONS = {
    "shardrun_set_name": (_INT,),
    "shardrun_set_works": (_INT,),
    "shardrun_pack": (_POINTER, _SIZE, _SIZE, _SIZE, _POINTER),
    "shardrun_linear": (
        _INT, _POINTER, _INT, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER,
        _POINTER, _POINTER, _INT, _POINTER,
    ),
    "shardrun_bfloat16": (
        _INT, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER,
    ),
    "shardrun_attend": (
        _INT, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _INT, _SIZE, _SIZE, _POINTER, _SIZE,
        _SIZE, _SIZE, _SIZE, _POINTER,
    ),
    "shardrun_rms_norm": (
        _INT, _POINTER, _POINTER, _POINTER, _INT, _SIZE, _SIZE, ctypes.c_float, _POINTER,
    ),
    "shardrun_silu_product": (_INT, _POINTER, _INT, _SIZE, _SIZE, _POINTER),
    "shardrun_rotate": (
        _INT, _POINTER, _INT, _SIZE, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER,
    ),
}  # fmt: skip


class NativeKernel:
    """The C path.

    Args:
        instruction_set: one of `instruction_sets()`; None takes the widest.

    Raises:
        OSError: the library is not there, or cannot be loaded.
    """

    name = "native"

    def __init__(self, instruction_set: str | None = None) -> None:
        known = instruction_sets()
        self.instruction_set = instruction_set or list(known)[-1]
        self.set_index = known[self.instruction_set]

    def pack(self, weight: QuantizedWeight) -> PackedWeight:
        return NativeWeight(weight, self.set_index)


class NativeWeight(PackedWeight):
    """A weight in blocks of 32 output channels, as int8.c reads them."""

    def __init__(self, weight: QuantizedWeight, set_index: int) -> None:
        out_features, in_features = weight.shape
        values_NK = weight.values_NK
        if values_NK.stride(1) != 1:
            values_NK = values_NK.contiguous()
        self._set_index = set_index
        self._packed = torch.empty(
            -(-out_features // BLOCK), -(-in_features // 2), BLOCK, 2, dtype=torch.int8
        )
        library().shardrun_pack(
            values_NK.data_ptr(), values_NK.stride(0), *values_NK.shape, self._packed.data_ptr()
        )
        self.scale_N = weight.scale_NG.float().reshape(-1).contiguous()
        self.activation_dtype = weight.activation_dtype
        self.shape = (out_features, in_features)
        self.nbytes = self._packed.nbytes + self.scale_N.nbytes

    def linear(self, x_MK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        kind = out_dtype if out_dtype in _TYPES else torch.float32
        bias_N = None if bias_N is None else bias_N.float().contiguous()
        return self._multiply(x_MK, None, bias_N, kind).to(out_dtype)

    def sums(self, x_MK: Tensor, amax_M: Tensor) -> Tensor:
        kind = torch.int64 if self.activation_dtype is None else torch.int32
        return self._multiply(x_MK, amax_M, None, kind)

    def _multiply(
        self, x_MK: Tensor, amax_M: Tensor | None, bias_N: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        levels = num_levels(x_MK.dtype, self.activation_dtype)
        if x_MK.dtype not in _TYPES or x_MK.stride(1) != 1:
            x_MK = x_MK.contiguous() if x_MK.dtype in _TYPES else x_MK.float()
        num_rows, in_features = x_MK.shape
        assert in_features == self.shape[1], (x_MK.shape, self.shape)
        assert bias_N is None or len(bias_N) == self.shape[0], (bias_N, self.shape)
        num_planes = 1 if levels <= torch.iinfo(torch.int16).max else 2
        work_size = num_rows * (num_planes * 2 * (in_features + in_features % 2) + 4)
        work = torch.empty(work_size, dtype=torch.uint8)
        out_MN = torch.empty(num_rows, self.shape[0], dtype=out_dtype)
        library().shardrun_linear(
            self._set_index, x_MK.data_ptr(), _TYPES[x_MK.dtype], x_MK.stride(0), _address(amax_M),
            num_rows, in_features, levels, self._packed.data_ptr(), self.shape[0],
            self.scale_N.data_ptr(), _address(bias_N), out_MN.data_ptr(), _TYPES[out_dtype],
            work.data_ptr(),
        )  # fmt: skip
        return out_MN


def linear_bfloat16(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` in float32, [M, N], of a contiguous bfloat16 weight; for few rows."""
    assert x_MK.shape[1] == weight_NK.shape[1], (x_MK.shape, weight_NK.shape)
    assert bias_N is None or len(bias_N) == weight_NK.shape[0], weight_NK.shape
    x_MK = x_MK.float()
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    bias_N = None if bias_N is None else bias_N.float().contiguous()
    out_MN = torch.empty(x_MK.shape[0], weight_NK.shape[0])
    library().shardrun_bfloat16(
        _widest(), x_MK.data_ptr(), x_MK.stride(0), *x_MK.shape,
        weight_NK.data_ptr(), weight_NK.shape[0], _address(bias_N), out_MN.data_ptr(),
    )  # fmt: skip
    return out_MN


def attend(q_BHC: Tensor, keys_BKLC: Tensor, values_BKLC: Tensor, lengths_B: Tensor) -> Tensor:
    """Decode attention, [B, H, C]: each head's query over the first positions of its sequence.

    Args:
        keys_BKLC, values_BKLC: views of the cache with the same strides; H is a multiple of K.
        lengths_B: int64, positions in use of each sequence, 1 to L.
    """
    batch, heads, channels = q_BHC.shape
    groups = heads // keys_BKLC.shape[1]
    out_BHC = torch.empty(batch, heads, channels, dtype=q_BHC.dtype)
    library().shardrun_attend(
        _widest(), q_BHC.data_ptr(), *q_BHC.stride()[:2],
        keys_BKLC.data_ptr(), values_BKLC.data_ptr(), _TYPES[q_BHC.dtype], *keys_BKLC.stride()[:2],
        lengths_B.data_ptr(), batch, keys_BKLC.shape[1], groups, channels, out_BHC.data_ptr(),
    )  # fmt: skip
    return out_BHC


def rms_norm(x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
    """`weight * (x / rms(x))`, after `x += delta` in place where there is one."""
    out_TD = torch.empty_like(x_TD)
    library().shardrun_rms_norm(
        _widest(), x_TD.data_ptr(), _address(delta_TD), weight_D.data_ptr(), _TYPES[x_TD.dtype],
        *x_TD.shape, eps, out_TD.data_ptr(),
    )  # fmt: skip
    return out_TD


def silu_product(gate_up_TF: Tensor) -> Tensor:
    """`silu(gate) * up` of rows that hold gate and up side by side, [T, F / 2]."""
    num_rows, width = gate_up_TF.shape
    out_TF = torch.empty(num_rows, width // 2, dtype=gate_up_TF.dtype)
    library().shardrun_silu_product(
        _widest(), gate_up_TF.data_ptr(), _TYPES[out_TF.dtype], *out_TF.shape, out_TF.data_ptr()
    )
    return out_TF


def rotate(x_TE: Tensor, num_heads: int, cos_T1C: Tensor, sin_T1C: Tensor) -> None:
    """Turn the first heads of each row in place."""
    library().shardrun_rotate(
        _widest(), x_TE.data_ptr(), _TYPES[x_TE.dtype], x_TE.stride(0), x_TE.shape[0], num_heads,
        cos_T1C.shape[-1], cos_T1C.data_ptr(), sin_T1C.data_ptr(),
    )  # fmt: skip


def takes(*tensors: Tensor) -> bool:
    """Whether the library is there and computes with tensors of this kind: contiguous, on the CPU."""
    first = tensors[0]
    return (
        first.dtype in (torch.float32, torch.bfloat16)
        and first.device.type == "cpu"
        and all(tensor.dtype == first.dtype and tensor.is_contiguous() for tensor in tensors)
        and is_available()
    )


def can_attend(q_BHC: Tensor, keys_BKLC: Tensor) -> bool:
    """Whether `attend` takes tensors of these shapes and dtypes, and the library is there."""
    _, heads, channels = q_BHC.shape
    return (
        q_BHC.device.type == "cpu"
        and q_BHC.dtype in (torch.float32, torch.bfloat16)
        and q_BHC.dtype == keys_BKLC.dtype
        and channels % 16 == 0
        and channels <= MAX_CHANNELS
        and heads // keys_BKLC.shape[1] <= MAX_GROUP
        and q_BHC.stride(2) == 1
        and is_available()
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def instruction_sets() -> dict[str, int]:
    """Those that were compiled and that this processor has, the widest last."""
    found = {}
    for index in range(16):
        name = library().shardrun_set_name(index)
        if name is None:
            break
        if library().shardrun_set_works(index):
            found[name.decode()] = index
    return found


@cache
def _widest() -> int:
    return max(instruction_sets().values())


@cache
def is_available() -> bool:
    """Whether the library is there and can be loaded."""
    try:
        return bool(instruction_sets())
    except OSError:
        return False


@cache
def library() -> ctypes.CDLL:
    """The library, its functions declared. torch's OpenMP, which it shares, is loaded by now.

    Raises:
        OSError: it is not there, or needs what this machine lacks.
    """
    path = find_compiled(Path(__file__).parent, "_native")
    if path is None:
        raise OSError("not compiled: there was no C compiler when shardrun was installed")
    found = ctypes.CDLL(str(path))
    for name, arguments in _FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = None, list(arguments)
    found.shardrun_set_name.restype = ctypes.c_char_p
    found.shardrun_set_works.restype = _INT
    return found
