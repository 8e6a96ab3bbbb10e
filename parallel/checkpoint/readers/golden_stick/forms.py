"""Which parts a quantized linear of Golden Stick's has, by its scheme: dtypes and shapes.

Integers of 8 bits lie as [out, in]; those of 4 bits transposed, [in, out / 2], the even output channel
in the low nibble. A scale a channel is [out], and one a group [in / group, out].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from parallel.checkpoint.readers.golden_stick.names import (
    BOTH_SCALES,
    BOTH_ZEROS,
    CORRECTION,
    INPUT_SCALE,
    INPUT_ZERO,
    KEY_SCALE,
    KEY_SCALE_COPY,
    KEY_ZERO,
    KEY_ZERO_COPY,
    ORDER,
    PRODUCT_SCALE,
    SCALE,
    SHIFT,
    SMOOTH,
    VALUE_SCALE,
    VALUE_SCALE_COPY,
    VALUE_ZERO,
    VALUE_ZERO_COPY,
    WEIGHT,
    ZERO,
)
from parallel.checkpoint.source import FLOAT_DTYPES
from parallel.placement import Shape
from quant.scheme import LinearScheme

_WIDE = (*FLOAT_DTYPES, "float64")
_INTEGERS = ("int8", "int32", "int64")


@dataclass(frozen=True)
class Axis:
    """What an axis of a stored tensor runs along.

    Attributes:
        dim: of the weight: 0, its output channels, or 1, its input channels; None: of neither.
        per: how many of them an entry stands for; of neither, how many entries there are.
    """

    dim: int | None
    per: int = 1

    def length(self, shape: Shape) -> int:
        return self.per if self.dim is None else shape[self.dim] // self.per


Axes = tuple[Axis, ...]
OUT, IN, ONE = Axis(0), Axis(1), Axis(None)


@dataclass(frozen=True)
class Form:
    """How a part is stored.

    Attributes:
        axes: one of these.
    """

    dtypes: tuple[str, ...]
    axes: tuple[Axes, ...]
    is_needed: bool = True

    @classmethod
    def of_floats(cls, num_axes: int) -> Form:
        """A tensor that is not quantized."""
        return cls(FLOAT_DTYPES, ((OUT, IN)[:num_axes],))


_OPTIONAL_COPY = Form((*_WIDE, *_INTEGERS), ((OUT,),), is_needed=False)
_OPTIONAL_PAIR = Form((*_WIDE, *_INTEGERS), ((Axis(None, 2), OUT),), is_needed=False)
# Of the static scales of a layer's KV cache, one of each channel.
CACHE_FORMS: Mapping[str, Form] = {
    **dict.fromkeys((KEY_SCALE, KEY_ZERO, VALUE_SCALE, VALUE_ZERO), Form.of_floats(1)),
    **dict.fromkeys(
        (KEY_SCALE_COPY, KEY_ZERO_COPY, VALUE_SCALE_COPY, VALUE_ZERO_COPY), _OPTIONAL_COPY
    ),
    **dict.fromkeys((BOTH_SCALES, BOTH_ZEROS), _OPTIONAL_PAIR),
}


def linear_forms(
    scheme: LinearScheme, found: Collection[str], *, has_bias: bool
) -> Mapping[str, Form]:
    """The parts of one linear by kind.

    Args:
        found: the kinds that the files have of it: a scale may be told by another.
        has_bias: whether the model has a bias there, to which RTN's successors add what a zero point
            of the input does.
    """
    scales = Form(FLOAT_DTYPES, (_scale_axes(scheme),))
    forms = {
        WEIGHT: _weight(scheme),
        SCALE: scales,
        ZERO: scales,
        SMOOTH: _input_part(FLOAT_DTYPES),
    }
    if scheme.is_static:
        return {**_optional(forms, ZERO), **_static(found, has_bias)}
    if scheme.activation_dtype is not None:
        return _optional(forms, ZERO)
    return {**forms, ORDER: _input_part(_INTEGERS)}


def _optional(forms: Mapping[str, Form], kind: str) -> dict[str, Form]:
    return {**forms, kind: Form(forms[kind].dtypes, forms[kind].axes, is_needed=False)}


def _weight(scheme: LinearScheme) -> Form:
    if scheme.bits == 8:
        return Form(("int8",), ((OUT, IN),))
    return Form(("uint8", "int8"), ((IN, Axis(0, 2)),))


def _scale_axes(scheme: LinearScheme) -> Axes:
    return (OUT,) if scheme.group_size is None else (Axis(1, scheme.group_size), OUT)


def _input_part(dtypes: tuple[str, ...]) -> Form:
    return Form(dtypes, ((IN,),), is_needed=False)


def _static(found: Collection[str], has_bias: bool) -> dict[str, Form]:
    """Either scale tells the other: that of the product is the weight's times the input's."""
    return {
        SCALE: Form(FLOAT_DTYPES, ((OUT,),), is_needed=False),
        PRODUCT_SCALE: Form(("int64", "float32", "float64"), ((OUT,),), SCALE not in found),
        INPUT_SCALE: Form(_WIDE, ((ONE,), (IN,))),
        INPUT_ZERO: Form((*_INTEGERS, *_WIDE), ((ONE,), (IN,))),
        CORRECTION: Form(("int32", *FLOAT_DTYPES), ((OUT,),), is_needed=not has_bias),
        SHIFT: _input_part(FLOAT_DTYPES),
    }
