"""How a checkpoint stretches its rotary positions: `rope_scaling` of `config.json`. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallel.errors import ModelError

_KINDS = ("linear", "llama3")
# Frequencies are float32; positions are int32 in other people's kernels.
_MOST = 2.0**31


@dataclass(frozen=True)
class RopeScaling:
    """`linear` (positions divided by factor) or `llama3` (low frequencies divided by factor)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


def parse_rope_scaling(value: object, source: str) -> RopeScaling | None:
    """Read `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

    Raises:
        ModelError: a kind that is not known, or a number that is missing.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ModelError(f"{source}: rope_scaling must be an object or null, but is {value!r}.")
    if "factor" in value and not {"rope_type", "type"} & value.keys():
        raise ModelError(f"{source}: rope_scaling has a factor, but no rope_type: {value!r}.")
    kind = value.get("rope_type", value.get("type", "default"))
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ModelError(
            f"{source}: the rope_type of rope_scaling must be one of default, {', '.join(_KINDS)}, "
            f"but is {kind!r}."
        )
    keys = ["factor"] if kind == "linear" else _LLAMA3_KEYS
    scaling = RopeScaling(kind, **{key: _number(value, key, source) for key in keys})  # type: ignore[arg-type]
    if kind == "llama3" and not scaling.low_freq_factor < scaling.high_freq_factor:
        raise ModelError(
            f"{source}: rope_scaling.high_freq_factor must be above low_freq_factor "
            f"({scaling.low_freq_factor}), but is {scaling.high_freq_factor}."
        )
    return scaling


_LLAMA3_KEYS = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]


def _number(value: Mapping[str, Any], key: str, source: str) -> float:
    number: Any = value.get(key)
    if type(number) in (int, float) and 0 < number <= _MOST:
        return float(number)
    raise ModelError(
        f"{source}: rope_scaling.{key} must be a number above 0 and at most {_MOST:g}, "
        f"but is {number!r}."
    )
