"""How a checkpoint turns its heads: the rotary keys of `config.json`. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from parallel.errors import ModelError
from parallel.model.config_values import Values

# Frequencies are float32; positions are int32 in other people's kernels.
_MOST = 2.0**31
_LEAST = 1e-30
# What each kind reads. A number of another kind is left over from it and says nothing.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": ("rope_theta", "rope_type", "type", "partial_rotary_factor"),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate",
    ),
}  # fmt: skip
_KNOWN = frozenset(key for keys in _KEYS.values() for key in keys)
# What writers noted there, and nobody computes with: `finetuned` stands in YaRN's published configs.
_NOTED = frozenset({"finetuned"})


@dataclass(frozen=True)
class RopeScaling:
    """`linear` (positions divided by factor), `llama3` (low frequencies divided by factor), or `yarn`
    (low frequencies divided by factor, cos and sin multiplied by attention_factor).

    Attributes:
        beta_fast, beta_slow: yarn: turns in the original context above which a frequency is kept, and
            below which it is divided.
        truncate: yarn: those two are taken at whole dimensions.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: float = 0.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def read_rope(config: Values) -> tuple[float, RopeScaling | None]:
    """`rope_theta` and the scaling.

    transformers 5 keeps both under `rope_parameters`; 4 has `rope_scaling`, and theta beside it. What
    is inside comes before what is beside it.

    Raises:
        ModelError: a kind or a key that is not known, or a number that is missing.
    """
    both = [_read_dict(config, key) for key in ("rope_parameters", "rope_scaling")]
    together, second = (_scaling(config, rope) for rope in both)
    if both[0].values and second not in (None, together):
        rule = "must not contradict rope_parameters"
        raise config.error("rope_scaling", rule, config.values["rope_scaling"])
    inside = both[0] if both[0].values else both[1]
    holder = inside if inside.values.get("rope_theta") is not None else config
    theta, scaling = holder.number("rope_theta", 10000.0, 1.0, 1e30), together or second
    if scaling is not None and scaling.kind == "yarn" and theta == 1.0:
        raise holder.error("rope_theta", "must be above 1 with yarn", theta)
    return theta, scaling


def _read_dict(config: Values, key: str) -> Values:
    value = config.values.get(key)
    if value is not None and not isinstance(value, dict):
        raise config.error(key, "must be an object or null", value)
    return Values(value or {}, f"{config.source}: {key}")


def _scaling(config: Values, rope: Values) -> RopeScaling | None:
    if unknown := [key for key in rope.values if key not in _KNOWN | _NOTED]:
        raise ModelError(
            f"{rope.source}: {unknown[0][:200]} must not be there, as it is no key that is read "
            f"({', '.join(sorted(_KNOWN))}); drop it if the model does without."
        )
    if rope.values.get("partial_rotary_factor") not in (None, 1.0):
        rule = "must be 1.0"
        raise rope.error("partial_rotary_factor", rule, rope.values["partial_rotary_factor"])
    kind = rope.values.get("rope_type", rope.values.get("type"))
    if kind is None and "factor" in rope.values:
        raise rope.error("rope_type", f"must be given with a factor, {_kinds()}", kind)
    if kind not in (None, *_KEYS):
        raise rope.error("rope_type", f"must be {_kinds()}", kind)
    read = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}.get(kind or "")
    return read(config, rope) if read else None


def _kinds() -> str:
    return f"one of {', '.join(_KEYS)}"


def _number(rope: Values, key: str, default: float | None = None) -> float:
    return rope.number(key, default, _LEAST, _MOST)


def _linear(config: Values, rope: Values) -> RopeScaling:
    return RopeScaling("linear", _number(rope, "factor"))


def _llama3(config: Values, rope: Values) -> RopeScaling:
    found = RopeScaling("llama3", **{key: _number(rope, key) for key in _KEYS["llama3"]})  # type: ignore[arg-type]
    if not found.low_freq_factor < found.high_freq_factor:
        rule = f"must be above low_freq_factor ({found.low_freq_factor})"
        raise rope.error("high_freq_factor", rule, found.high_freq_factor)
    return found


def _yarn(config: Values, rope: Values) -> RopeScaling:
    context = config.positive("max_position_embeddings", 2048)
    factor = _number(rope, "factor")
    given = rope.values.get("attention_factor")
    found = RopeScaling(
        "yarn",
        factor,
        original_max_position_embeddings=_number(rope, "original_max_position_embeddings", context),
        attention_factor=(
            _attention_factor(rope, factor) if given is None else _number(rope, "attention_factor")
        ),
        beta_fast=_number(rope, "beta_fast", 32.0),
        beta_slow=_number(rope, "beta_slow", 1.0),
        truncate=rope.boolean("truncate", True),
    )
    if not found.beta_slow < found.beta_fast:
        raise rope.error(
            "beta_fast", f"must be above beta_slow ({found.beta_slow})", found.beta_fast
        )
    return found


def _attention_factor(rope: Values, factor: float) -> float:
    """Peng et al., YaRN (2023), equation 22, and DeepSeek's two numbers in its place."""
    both = [rope.values.get(key) for key in ("mscale", "mscale_all_dim")]
    if not all(both):
        return _mscale(factor, 1.0)
    return _mscale(factor, _number(rope, "mscale")) / _mscale(
        factor, _number(rope, "mscale_all_dim")
    )


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
