"""The compiled library: its functions, their arguments, and the instruction sets it was built for."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.compiled import find_compiled
from quant.kernels.native.recording import active

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2, torch.int64: 3, torch.int8: 4}
_POINTER, _SIZE, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
# The functions that take one struct, and its fields as the C files declare them: numbers, addresses
# (*) and doubles (%), each of eight bytes.
_CALLS = {
    "linear": "set *x x_type x_stride *amax *input_scale zero_point M K levels *packed N *scale *bias "
    "bias_type *out out_type *damaged *work",
    "int4": "set *x x_type x_stride *amax M K levels *packed bits N before group_size first *scales "
    "scales_type *scale *bias bias_type *out out_type bare *work",
    "row_amax": "set *x x_type x_stride M K *amax",
    "finish": "*sums sums_type *amax *input_scale *damaged levels M N *scale *bias bias_type *out "
    "out_type",
    "bfloat16": "set *x x_type x_stride M K *w N *bias bias_type *out out_type *work",
    "attend": "set *q type q_row q_head *keys *values cached row head *key_scale *value_scale "
    "is_static scale_row scale_head *positions window B K G C *out",
    "write_slots": "*keys *values stride *slots T H bytes *to_keys *to_values head",
    "write_int8": "set *keys *values type stride *slots T H C *to_keys *to_values head *key_scale "
    "*value_scale is_static scale_head",
    "rms_norm": "set *x *delta *weight type T D %eps *out",
    "norm_heads": "set *x type stride T H K C *q_weight *k_weight %eps",
    "silu_product": "set *gate_up type T F *out",
    "rotate": "set *x type stride T H C *cos *sin *positions",
    "group_amax": "set *x type stride N K S *amax",
    "round_groups": "set *x type stride N K S *scale lowest highest *out",
    "round_sums": "*sums *bias bias_type T D *out",
}
_FIELD_TYPES = {"*": _POINTER, "%": _DOUBLE}


def call(name: str, *values: Any) -> None:
    """Call one of `_CALLS` with the fields of its struct; a tensor or None stands for its address."""
    function, arguments_type = _functions()[name]
    arguments = arguments_type(*map(_plain, values))
    function(ctypes.byref(arguments))
    if (recording := active()) is not None:
        recording.add(function, arguments)


def _plain(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


@cache
def _functions() -> dict[str, tuple[Any, type[ctypes.Structure]]]:
    return {
        name: (getattr(open_library(), f"shardrun_{name}"), _struct(name, fields.split()))
        for name, fields in _CALLS.items()
    }


def _struct(name: str, fields: list[str]) -> type[ctypes.Structure]:
    typed = [(field.lstrip("*%"), _FIELD_TYPES.get(field[0], _SIZE)) for field in fields]
    return type(name, (ctypes.Structure,), {"_fields_": typed})


@cache
def instruction_sets() -> dict[str, int]:
    """Those that were compiled and that this processor has, the widest last."""
    found = {}
    for index in range(16):
        name = open_library().shardrun_set_name(index)
        if name is None:
            break
        if open_library().shardrun_set_works(index):
            found[name.decode()] = index
    return found


@cache
def widest() -> int:
    return max(instruction_sets().values())


@cache
def is_available() -> bool:
    """Whether the library is there and can be loaded."""
    try:
        return bool(instruction_sets())
    except OSError:
        return False


@cache
def open_library() -> ctypes.CDLL:
    """The library. torch's OpenMP, which it shares, is loaded by now.

    Raises:
        OSError: it is not there, or needs what this machine lacks.
    """
    if sys.byteorder != "little":
        raise OSError("it is written for little-endian processors")
    path = find_compiled(Path(__file__).parent, "_native")
    if path is None:
        raise OSError("not compiled: there was no C compiler when shardrun was installed")
    found = ctypes.CDLL(str(path))
    found.shardrun_set_name.argtypes = found.shardrun_set_works.argtypes = [ctypes.c_int]
    found.shardrun_set_name.restype = ctypes.c_char_p
    found.shardrun_width.argtypes = [ctypes.c_int, _SIZE]
    for kind in ("pairs", "quads", "int4", "nibbles"):
        pack = getattr(found, f"shardrun_pack_{kind}")
        pack.argtypes = [_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _SIZE]
        pack.restype = None
    found.shardrun_run.argtypes = [_POINTER, _SIZE, _SIZE, _POINTER]
    found.shardrun_run.restype = _SIZE
    return found
