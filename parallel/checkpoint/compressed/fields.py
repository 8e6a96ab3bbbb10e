"""What each key of a compressed-tensors `quantization_config` may say, where it is read here.

A key that is not listed is refused by name, as is a value that would change what the integers mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from parallel.checkpoint.compressed.config import INTEGERS, KEY, METHOD, MIXED, PACKED
from parallel.errors import CheckpointError
from quant.scheme_checks import GROUP_SIZES

# Characters of a value that a message shows.
_LONGEST_VALUE = 200
_REMEDY = "give the unquantized checkpoint and quantize it with quant=rtn_a16w8."


@dataclass(frozen=True)
class Field:
    """Which values of a key are read, how a refusal says so, and what its absence means."""

    allows: Callable[[Any], bool]
    rule: str
    default: Any = None


def _one_of(*allowed: Any, because: str = "", default: Any = None) -> Field:
    """Equal to one of these and of its type: JSON's true is no 1."""
    shown = " or ".join("null" if item is None else _json_word(item) for item in allowed)
    return Field(
        lambda value: any(type(value) is type(item) and value == item for item in allowed),
        f"must be {shown}{because and f' ({because})'}",
        default,
    )


def _json_word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_text_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_dense(value: object) -> bool:
    return value in (None, {}) or (isinstance(value, dict) and value.get("format") == "dense")


_ANY = Field(lambda _: True, "")
_MAPPING = Field(lambda value: isinstance(value, dict), "must be an object")
_NOTHING = _one_of(None)

CONFIG: Mapping[str, Field] = {
    "quant_method": _one_of(METHOD),
    "format": _one_of(PACKED, INTEGERS, MIXED),
    # "frozen" is what early releases left in a checkpoint of integers.
    "quantization_status": _one_of("compressed", "frozen", None),
    "config_groups": Field(
        lambda value: isinstance(value, dict) and bool(value), "must be an object of groups"
    ),
    "ignore": Field(lambda value: value is None or _is_text_list(value), "must be a list of names"),
    "kv_cache_scheme": _one_of(None, because="scales of a KV cache are not read"),
    "sparsity_config": Field(_is_dense, "must be null or dense (2:4 sparsity is not read)"),
    "transform_config": Field(
        lambda value: value in (None, {}), "must be null (rotations are not read)"
    ),
    "moe_sparsity_config": _NOTHING,
    # What they say of the checkpoint changes nothing in it.
    "global_compression_ratio": _ANY,
    "version": _ANY,
}
GROUP: Mapping[str, Field] = {
    "targets": Field(lambda value: _is_text_list(value) and bool(value), "must be a list of names"),
    "weights": _MAPPING,
    "input_activations": Field(
        lambda value: value is None or isinstance(value, dict), "must be an object or null"
    ),
    "output_activations": _one_of(None, because="outputs are not quantized here"),
    "format": _one_of(PACKED, INTEGERS, None),
}
_INT = _one_of("int", because="fp8 and other floats are not read", default="int")
# Of the calibration that was, and of the dtype of zero points, which the file says too.
_PAST = {"observer": _ANY, "observer_kwargs": _ANY, "zp_dtype": _ANY}
WEIGHTS: Mapping[str, Field] = {
    "num_bits": _one_of(8, 4, default=8),
    "type": _INT,
    "symmetric": _one_of(True, because="zero points of weights are not read", default=True),
    "strategy": _one_of("channel", "group", because="other scales are not read"),
    "group_size": _one_of(*GROUP_SIZES, -1, None),
    "dynamic": _one_of(False, because="weights have scales of their own", default=False),
    # Both leave the columns in their order; "group" would not.
    "actorder": _one_of("weight", "static", False, None, because="g_idx is not read"),
    "block_structure": _NOTHING,
    "scale_dtype": _NOTHING,
    **_PAST,
}
ACTIVATIONS: Mapping[str, Field] = {
    "num_bits": _one_of(8, default=8),
    "type": _INT,
    "symmetric": _one_of(True, False, default=True),
    "strategy": _one_of("token", "tensor", because="other scales are not read"),
    "group_size": _NOTHING,
    "dynamic": _one_of(True, False, default=False),
    "actorder": _one_of(False, None),
    "block_structure": _NOTHING,
    "scale_dtype": _NOTHING,
    **_PAST,
}


@dataclass(frozen=True)
class Place:
    """Where in which file a value stands, as an error says it."""

    file: str
    path: str = KEY

    def __truediv__(self, key: str) -> Place:
        return Place(self.file, f"{self.path}.{key}")

    def refuse(self, rule: str, value: object) -> CheckpointError:
        shown = repr(value)
        shown = shown if len(shown) <= _LONGEST_VALUE else shown[:_LONGEST_VALUE] + "…"
        return CheckpointError(f"{self.file}: {self.path} {rule}, but is {shown}; {_REMEDY}")

    def refuse_key(self, key: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: {self.path} has the key {key!r}, which is not read; {_REMEDY}"
        )


def take(values: Mapping[str, Any], fields: Mapping[str, Field], place: Place) -> dict[str, Any]:
    """The values of all keys, defaults among them.

    Raises:
        CheckpointError: a key that is not known, or a value that is not read.
    """
    for key in values:
        if key not in fields:
            raise place.refuse_key(key)
    found = {key: values.get(key, field.default) for key, field in fields.items()}
    for key, field in fields.items():
        if not field.allows(found[key]):
            raise (place / key).refuse(field.rule, found[key])
    return found
