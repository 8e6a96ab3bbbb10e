"""The tensors that stand for one linear in the files of compressed-tensors. Needs no torch."""

from __future__ import annotations

from collections.abc import Container, Iterator

from parallel.checkpoint.compressed.config import PACKED, CompressedLinear
from parallel.checkpoint.layout import INPUT_SCALE, INPUT_ZERO_POINT, SCALE_SUFFIX
from parallel.checkpoint.source import FLOAT_DTYPES
from parallel.placement import Shape

# Parts of a linear that stand for what is not read, and what that is.
UNREAD = {
    ".weight_zero_point": "zero points of asymmetric weights",
    ".weight_g_idx": "columns in another order (g_idx)",
    ".weight_global_scale": "scales of 4-bit floats",
    ".k_scale": "scales of a KV cache",
    ".v_scale": "scales of a KV cache",
    ".bitmask": "sparse weights",
    ".compressed": "sparse weights",
}
# Shapes of one number.
ONE: tuple[Shape, ...] = ((1,), ())


def part_names(name: str, linear: CompressedLinear, present: Container[str]) -> tuple[str, ...]:
    """The tensors that stand for a weight in the files, its values first.

    Args:
        present: the names in the files: what may be left out is named where it is there.
    """
    values = (f"{name}_packed", f"{name}_shape") if linear.format == PACKED else (name,)
    scales: tuple[str, ...] = (name + SCALE_SUFFIX,)
    if linear.scheme.is_static:
        scales += (input_scale_of(name),)
        zero_point = zero_point_of(name)
        scales += (zero_point,) if linear.is_asymmetric or zero_point in present else ()
    return values + scales


def parts_of(
    name: str, linear: CompressedLinear, shape: Shape, present: Container[str]
) -> Iterator[tuple[str, tuple[str, ...], tuple[Shape, ...]]]:
    """Each of `part_names` with the dtypes and the shapes it may have."""
    rows, columns = shape
    num_groups = -(-columns // (linear.scheme.group_size or columns))
    yield name + SCALE_SUFFIX, FLOAT_DTYPES, ((rows, num_groups),)
    if linear.scheme.is_static:
        yield input_scale_of(name), FLOAT_DTYPES, ONE
        zero_point = zero_point_of(name)
        if linear.is_asymmetric or zero_point in present:  # symmetric ones may have zeros
            yield zero_point, ("int8", "int32", "int64"), ONE
    if linear.format == PACKED:
        yield f"{name}_packed", ("int32",), ((rows, -(-columns * linear.scheme.bits // 32)),)
        yield f"{name}_shape", ("int64", "int32"), ((2,),)
    else:
        yield name, ("int8",), (shape,)


def input_scale_of(name: str) -> str:
    """The scale of the static input of a weight's product."""
    return f"{module_of(name)}.{INPUT_SCALE}"


def zero_point_of(name: str) -> str:
    """The zero point of the static input of a weight's product."""
    return f"{module_of(name)}.{INPUT_ZERO_POINT}"


def module_of(name: str) -> str:
    return name.rpartition(".")[0]
