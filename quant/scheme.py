"""What is quantized, to what, and how: the contents of `quant.*` and of a `quantization_config`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from quant.errors import QuantError

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

# Names that mean one thing in MindFormers' files and another word in a Hugging Face checkpoint.
MINDFORMERS_MODULES: Mapping[str, str] = {
    "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
    "attention": "self_attn", "feed_forward": "mlp",
}  # fmt: skip


@dataclass(frozen=True)
class QuantScheme:
    """One quantization scheme; the fields are those of the `quant` configuration group.

    Raises QuantError for a value outside its list and for a combination that cannot be computed:
    nothing is silently left unquantized.
    """

    quant_method: str | None = None
    weight_dtype: str | None = None
    activation_dtype: str | None = None
    kvcache_dtype: str | None = None
    outliers_suppression: str | None = None
    precision_recovery: str | None = None
    modules_to_not_convert: tuple[str, ...] = ("lm_head",)
    algorithm_args: Mapping[str, Any] = field(default_factory=dict)
    weight_quant_granularity: str = "per_channel"
    group_size: int | None = None
    act_quant_granularity: str = "per_token"
    kvcache_quant_granularity: str = "per_token"
    layer_policies: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            _check_choice(name, getattr(self, name), allowed)
        _check_types(self)
        _check_method(self)
        _check_effects(self)
        _check_supported(self)

    @property
    def quantizes_weights(self) -> bool:
        return self.weight_dtype is not None

    @property
    def label(self) -> str:
        """The field's short name of the scheme: `w8a16`, `w8a8`, or `none`."""
        if self.weight_dtype is None:
            return "none"
        return "w8a8" if self.activation_dtype == "int8" else "w8a16"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON and YAML values; `from_dict` of the result is equal to this scheme."""
        values = asdict(self)
        values["modules_to_not_convert"] = list(self.modules_to_not_convert)
        values["layer_policies"] = [dict(policy) for policy in self.layer_policies]
        values["algorithm_args"] = dict(self.algorithm_args)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantScheme:
        """Build from a mapping such as a manifest's; an unknown key is an error."""
        known = {item.name for item in fields(cls)}
        for key in values:
            if key not in known:
                raise QuantError(f"`quant.{key}` is not a key; {_nearest(key, known)}.")
        return cls(**{**values, **{key: _tuple(values, key) for key in _TUPLES if key in values}})

    def left_out(self, modules: Iterable[str]) -> frozenset[str]:
        """The modules that `modules_to_not_convert` leaves unquantized.

        A pattern matches the whole module path or its last component (fnmatch). Raises QuantError
        for a pattern that matches no module: it would be ignored, and the user would not know.
        """
        modules = tuple(modules)
        matched: set[str] = set()
        for pattern in self.modules_to_not_convert:
            hits = {name for name in modules if _matches(name, pattern)}
            if not hits:
                raise QuantError(_no_match(pattern, modules))
            matched |= hits
        if len(matched) == len(modules):
            raise QuantError(
                f"`quant.modules_to_not_convert` matches every module with "
                f"{list(self.modules_to_not_convert)!r}, so nothing would be quantized; drop a "
                "pattern, or write quant=none."
            )
        return frozenset(matched)


_TUPLES = ("modules_to_not_convert", "layer_policies")


def _tuple(values: Mapping[str, Any], key: str) -> tuple[Any, ...]:
    value = values[key] if values[key] is not None else ()
    if not isinstance(value, list | tuple):
        raise QuantError(f"`quant.{key}` must be a list, but is {value!r}.")
    return tuple(value)


def translate_mindformers(pattern: str) -> str:
    """`w2` -> `down_proj`, `model.layers.0.attention.wo` -> `model.layers.0.self_attn.o_proj`."""
    return ".".join(MINDFORMERS_MODULES.get(part, part) for part in pattern.split("."))


def _matches(name: str, pattern: str) -> bool:
    pattern = translate_mindformers(pattern)
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def _no_match(pattern: str, modules: tuple[str, ...]) -> str:
    last_components = sorted({name.rpartition(".")[2] for name in modules})
    return (
        f"`quant.modules_to_not_convert` has the pattern {pattern!r}, which matches no module; "
        f"write a module path or one of {', '.join(last_components)}."
    )


def _check_choice(name: str, value: object, allowed: tuple[str | None, ...]) -> None:
    if value in allowed:
        return
    names = [str(item) for item in allowed if item is not None]
    shown = ", ".join(["null" if item is None else item for item in allowed])
    raise QuantError(
        f"`quant.{name}` must be one of {shown}, but is {value!r}; {_nearest(str(value), names)}."
    )


def _nearest(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word.replace("-", ""), list(known), n=1, cutoff=0.3)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"


def _check_types(scheme: QuantScheme) -> None:
    """What a manifest or a YAML file may hold where the command line's schema does not look."""
    patterns, arguments = scheme.modules_to_not_convert, scheme.algorithm_args
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise QuantError(
            f"`quant.modules_to_not_convert` must be a list of patterns, but is {list(patterns)!r}."
        )
    if not isinstance(arguments, Mapping):
        raise QuantError(f"`quant.algorithm_args` must be a mapping, but is {arguments!r}.")


# A field that has no effect unless another one is set: refused, or its user would not know.
_NEEDS: Mapping[str, str] = {
    "modules_to_not_convert": "quant_method",
    "algorithm_args": "quant_method",
    "activation_dtype": "weight_dtype",
    "act_quant_granularity": "activation_dtype",
    "kvcache_quant_granularity": "kvcache_dtype",
}


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


def _check_method(scheme: QuantScheme) -> None:
    """A method that has nothing to quantize, or something to quantize without a method, is refused."""
    targets = (scheme.weight_dtype, scheme.activation_dtype, scheme.kvcache_dtype)
    if scheme.quant_method is None and any(targets):
        raise QuantError(
            "`quant.quant_method` must be rtn where a quant dtype is set, but is null; "
            "write quant=rtn_a16w8."
        )
    if scheme.quant_method is not None and not any(targets):
        raise QuantError(
            f"`quant.quant_method` is {scheme.quant_method}, but weight_dtype, activation_dtype and "
            "kvcache_dtype are all null, so nothing would be quantized; set one, or write quant=none."
        )


# What can be computed today. Each entry: the field, the values that run, what to write instead.
_SUPPORTED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("quant_method", (None, "rtn")),
    ("weight_dtype", (None, "int8")),
    ("activation_dtype", (None, "int8")),
    ("act_quant_granularity", ("per_token",)),
    ("kvcache_dtype", (None,)),
    ("outliers_suppression", (None,)),
    ("precision_recovery", (None,)),
    ("weight_quant_granularity", ("per_channel",)),
    ("group_size", (None, 0)),
    ("algorithm_args", ({},)),
    ("layer_policies", ((),)),
)


def _check_supported(scheme: QuantScheme) -> None:
    for name, values in _SUPPORTED:
        value = getattr(scheme, name)
        if value not in values:
            raise QuantError(
                f"`quant.{name}` = {value!r} cannot be run by this version, which quantizes weights "
                "to int8 per channel (quant=rtn_a16w8), and activations per token (rtn_a8w8); nothing "
                "is left out silently, so it stops here."
            )
