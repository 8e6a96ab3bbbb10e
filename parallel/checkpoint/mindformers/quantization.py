"""Their quantization_config, as the keys of `quant`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from parallel.checkpoint.mindformers.file import ReadFile, is_blank
from quant.scheme import QuantScheme

_QUANT_KEYS = tuple(item.name for item in fields(QuantScheme))
_EMPTY: Mapping[str, Any] = {
    "modules_to_not_convert": [], "algorithm_args": {}, "layer_policies": [],
}  # fmt: skip
# Their defaults differ from ours, and with them the numbers.
_GRANULARITIES = {
    "act_quant_granularity": ("activation_dtype", "per_tensor"),
    "kvcache_quant_granularity": ("kvcache_dtype", "per_channel"),
}


def take_quantization(file: ReadFile, block: Any) -> None:
    """Values are passed on as they are: QuantScheme refuses `int-8`, which theirs reads as None."""
    section = "model.model_config.quantization_config"
    given = file.mapping(section, block)
    file.check_known(section, given, _QUANT_KEYS)
    for key, (dtype, default) in _GRANULARITIES.items():
        if not is_blank(given.get(dtype)) and is_blank(given.get(key)):
            given = {**given, key: default}
    for key, value in given.items():
        if not is_blank(value):
            # Their 0 is our null.
            file.values[f"quant.{key}"] = None if key == "group_size" and value == 0 else value
        elif not key.endswith("granularity"):
            file.values[f"quant.{key}"] = _EMPTY.get(key)
