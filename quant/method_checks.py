"""What a method needs, and the arguments it takes: each refusal is a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from quant.errors import QuantError
from quant.inputs import INPUTS

if TYPE_CHECKING:
    from quant.scheme import QuantScheme

Check = Callable[[Any], bool]
# The argument, whose it is, which values it takes, and those in words.
ARGUMENTS: Mapping[str, tuple[str, Check, str]] = {
    "alpha": ("smooth", lambda value: _is_number(value) and 0 <= value <= 1, "from 0 to 1"),
    "folds": (
        "outliers_suppression",
        lambda value: _are_inputs(value),
        f"a list of {', '.join(INPUTS)}, each at most once",
    ),
    "damp_percent": ("gptq", lambda value: _is_number(value) and 0 < value <= 1, "above 0, up to 1"),
    "desc_act": ("gptq", lambda value: isinstance(value, bool), "true or false"),
    "static_groups": ("gptq", lambda value: isinstance(value, bool), "true or false"),
}  # fmt: skip


def check_method(scheme: QuantScheme) -> None:
    """Raise QuantError for a method without its parts, parts without a method, or a wrong argument."""
    if scheme.quant_method == "rtn":
        _check_rtn(scheme)
    elif scheme.quant_method == "smooth_quant":
        _check_smooth_quant(scheme)
    _check_arguments(scheme)
    arguments = scheme.algorithm_args
    if arguments.get("desc_act") and scheme.group_size and not arguments.get("static_groups"):
        raise QuantError(
            "`quant.algorithm_args.desc_act` is true, but groups get their scales one after the "
            "other; set static_groups to true as well, or quantize per channel."
        )


def _check_rtn(scheme: QuantScheme) -> None:
    for name in ("outliers_suppression", "precision_recovery"):
        if getattr(scheme, name) is not None:
            raise QuantError(
                f"`quant.{name}` is {getattr(scheme, name)}, which has no effect while "
                "quant.quant_method is rtn; write quant.quant_method=ptq, or leave it out."
            )


def _check_smooth_quant(scheme: QuantScheme) -> None:
    if (scheme.weight_dtype, scheme.activation_dtype) != ("int8", "int8"):
        raise QuantError(
            "`quant.quant_method` is smooth_quant, which moves outliers of activations so that they "
            f"can be int8, but weight_dtype and activation_dtype are {scheme.weight_dtype} and "
            f"{scheme.activation_dtype}; write int8 for both, or "
            "quant.quant_method=ptq quant.outliers_suppression=smooth."
        )
    if (scheme.outliers_suppression, scheme.precision_recovery) != ("smooth", None):
        raise QuantError(
            "`quant.quant_method` is smooth_quant, whose outliers_suppression is smooth and whose "
            f"precision_recovery is null, but they are {scheme.outliers_suppression or 'null'} and "
            f"{scheme.precision_recovery or 'null'}; write quant=smooth_quant, or "
            "quant.quant_method=ptq."
        )


def _check_arguments(scheme: QuantScheme) -> None:
    parts = {scheme.outliers_suppression, scheme.precision_recovery}
    if scheme.outliers_suppression is not None:
        parts.add("outliers_suppression")
    for name, value in scheme.algorithm_args.items():
        if name not in ARGUMENTS:
            raise QuantError(
                f"`quant.algorithm_args.{name}` is not an argument; known: {', '.join(ARGUMENTS)}."
            )
        part, is_right, words = ARGUMENTS[name]
        if part not in parts:
            raise QuantError(
                f"`quant.algorithm_args.{name}` is {value!r}, which has no effect without "
                f"{part}; drop it."
            )
        if not is_right(value):
            raise QuantError(f"`quant.algorithm_args.{name}` must be {words}, but is {value!r}.")


def _are_inputs(value: object) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(value.count(name) == 1 and name in list(INPUTS) for name in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
