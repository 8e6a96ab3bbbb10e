"""What a scheme may say, and what of it can be computed: each refusal is a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING

from quant.errors import QuantError
from quant.method_checks import check_method

if TYPE_CHECKING:
    from quant.scheme import QuantScheme

ALLOWED: Mapping[str, tuple[str | None, ...]] = {
    "quant_method": (None, "rtn", "smooth_quant", "ptq"),
    "weight_dtype": (None, "int8", "int4"),
    "activation_dtype": (None, "int8"),
    "kvcache_dtype": (None, "int8"),
    "outliers_suppression": (None, "smooth", "awq"),
    "precision_recovery": (None, "gptq"),
    "weight_quant_granularity": ("per_channel", "per_group"),
    "act_quant_granularity": ("per_tensor", "per_token"),
    "kvcache_quant_granularity": ("per_channel", "per_token"),
}
GROUP_SIZES = (32, 64, 128)

# A field that has no effect unless another one is set: refused, or its user would not know.
_NEEDS: Mapping[str, str] = {
    "modules_to_not_convert": "quant_method",
    "algorithm_args": "quant_method",
    "layer_policies": "quant_method",
    "outliers_suppression": "weight_dtype",
    "precision_recovery": "weight_dtype",
    "activation_dtype": "weight_dtype",
    "act_quant_granularity": "activation_dtype",
    "weight_quant_granularity": "weight_dtype",
    "group_size": "weight_dtype",
    "kvcache_quant_granularity": "kvcache_dtype",
}


def check_scheme(scheme: QuantScheme) -> None:
    """Raise QuantError for a value outside its list, or a combination that cannot be computed."""
    for name, allowed in ALLOWED.items():
        _check_choice(name, getattr(scheme, name), allowed)
    _check_types(scheme)
    _check_method(scheme)
    _check_effects(scheme)
    _check_weightless(scheme)
    _check_groups(scheme)
    _check_activations(scheme)
    check_method(scheme)


def in_words(key: str, value: object) -> object:
    """The value of a field, spelled as here where it is a word; so in each policy."""
    if key in ALLOWED and isinstance(value, str):
        return value.lower()
    if key == "layer_policies" and isinstance(value, list | tuple):
        return [_policy_in_words(policy) for policy in value]
    return value


def _policy_in_words(policy: object) -> object:
    if not isinstance(policy, Mapping):
        return policy
    return {key: in_words(key, value) for key, value in policy.items()}


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence: `did you mean …?`, or the whole list."""
    close = get_close_matches(word.replace("-", ""), list(known), n=1, cutoff=0.3)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}."


def _check_choice(name: str, value: object, allowed: tuple[str | None, ...]) -> None:
    if value in allowed:
        return
    names = [str(item) for item in allowed if item is not None]
    shown = ", ".join(["null" if item is None else item for item in allowed])
    raise QuantError(
        f"`quant.{name}` must be one of {shown}, but is {value!r}; {nearest(str(value), names)}"
    )


def _check_types(scheme: QuantScheme) -> None:
    """What a manifest or a YAML file may hold where the command line's schema does not look."""
    patterns, arguments = scheme.modules_to_not_convert, scheme.algorithm_args
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise QuantError(
            f"`quant.modules_to_not_convert` must be a list of patterns, but is {list(patterns)!r}."
        )
    if not isinstance(arguments, Mapping):
        raise QuantError(
            f"`quant.algorithm_args` must be a mapping, but is {arguments!r}; write {{}} for none."
        )
    size = scheme.group_size
    if size is not None and (type(size) is not int or size not in GROUP_SIZES):
        raise QuantError(
            f"`quant.group_size` must be null or one of {', '.join(map(str, GROUP_SIZES))}, "
            f"but is {size!r}."
        )


def _check_method(scheme: QuantScheme) -> None:
    """A method that has nothing to quantize, or something to quantize without one, is refused."""
    targets = (scheme.weight_dtype, scheme.activation_dtype, scheme.kvcache_dtype)
    if scheme.quant_method is None and any(targets):
        raise QuantError(
            "`quant.quant_method` must be rtn where a quant dtype is set, but is null; "
            "write quant=rtn_a16w8, or quant.quant_method=rtn."
        )
    if scheme.quant_method is not None and not any(targets) and not scheme.layer_policies:
        raise QuantError(
            f"`quant.quant_method` is {scheme.quant_method}, but weight_dtype, activation_dtype and "
            "kvcache_dtype are all null, so nothing would be quantized; set one, or write quant=none."
        )


def _check_effects(scheme: QuantScheme) -> None:
    defaults = {item.name: item.default for item in fields(scheme)}
    for name, needed in _NEEDS.items():
        value = getattr(scheme, name)
        is_set = bool(value) if defaults[name] is MISSING else value != defaults[name]
        if is_set and getattr(scheme, needed) is None:
            shown = list(value) if isinstance(value, tuple) else value
            raise QuantError(
                f"`quant.{name}` is {shown!r}, which has no effect while quant.{needed} is null; "
                f"set quant.{needed} too, or leave it out."
            )


def _check_weightless(scheme: QuantScheme) -> None:
    """Patterns where no weight is quantized; `lm_head` and none are what presets say."""
    if scheme.quant_method is None or scheme.quantizes_weights:
        return
    patterns, policies = list(scheme.modules_to_not_convert), list(scheme.layer_policies)
    for name, value in (("modules_to_not_convert", patterns), ("layer_policies", policies)):
        if value not in ([], ["lm_head"]):
            raise QuantError(
                f"`quant.{name}` is {value!r}, which has no effect where no weight is quantized; "
                "set quant.weight_dtype too, or leave it out."
            )


def _check_groups(scheme: QuantScheme) -> None:
    is_grouped = scheme.weight_quant_granularity == "per_group"
    if is_grouped and scheme.group_size is None:
        raise QuantError(
            "`quant.weight_quant_granularity` is per_group, but quant.group_size is null; "
            f"write one of {', '.join(map(str, GROUP_SIZES))}."
        )
    if not is_grouped and scheme.group_size is not None:
        raise QuantError(
            f"`quant.group_size` is {scheme.group_size}, which has no effect while "
            "quant.weight_quant_granularity is per_channel; write per_group there, or leave it out."
        )


def _check_activations(scheme: QuantScheme) -> None:
    """A static scale of the whole tensor beside 4-bit weights is in nobody's table."""
    if (
        scheme.weight_dtype == "int4"
        and scheme.activation_dtype == "int8"
        and scheme.act_quant_granularity == "per_tensor"
    ):
        raise QuantError(
            "`quant.act_quant_granularity` must be per_token beside int4 weights, but is "
            "'per_tensor'; write per_token, or quant.weight_dtype=int8."
        )
