"""The `quantization_config` of a compressed-tensors checkpoint, written. Needs no torch.

A config holds groups, each of which says how its targets are quantized; `ignore` names what none of
them touches. Targets are exact module paths, `re:` and a regular expression, or a class (`Linear`).
The form is that of compressed-tensors 0.8 to 0.20, which transformers and vLLM read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quant.module_patterns import cover
from quant.scheme import LinearScheme

KEY = "quantization_config"
METHOD = "compressed-tensors"
# Integers packed into int32 words, for products with 16-bit activations.
PACKED = "pack-quantized"
# One integer a byte, for products with int8 activations.
INTEGERS = "int-quantized"
# Groups of both: each then says its own.
MIXED = "mixed-precision"
_HEAD = "lm_head"


@dataclass(frozen=True)
class CompressedLinear:
    """How a checkpoint holds one linear.

    Attributes:
        format: PACKED or INTEGERS.
    """

    scheme: LinearScheme
    format: str


def format_of(scheme: LinearScheme) -> str:
    """What compressed-tensors itself chooses for a scheme."""
    return PACKED if scheme.activation_dtype is None else INTEGERS


def is_compressed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that its checkpoint is one of compressed-tensors."""
    values = config.get(KEY)
    return isinstance(values, Mapping) and values.get("quant_method") == METHOD


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json as that of the unquantized model; other methods' words stay, to be refused."""
    if not is_compressed(config):
        return config
    return {key: value for key, value in config.items() if key != KEY}


def write_quantization(schemes: Mapping[str, LinearScheme | None]) -> dict[str, Any]:
    """The `quantization_config` of a model.

    Args:
        schemes: of each linear module; None: it is not quantized, and goes to `ignore`.
    """
    modules = tuple(schemes)
    kinds = list(dict.fromkeys(scheme for scheme in schemes.values() if scheme is not None))
    formats = {format_of(kind) for kind in kinds}
    is_mixed = len(formats) > 1
    groups = {}
    for number, kind in enumerate(kinds):
        members = [name for name in modules if schemes[name] == kind]
        targets = _class_target(members) if len(kinds) == 1 else _targets(members, modules)
        own_format = {"format": format_of(kind)} if is_mixed else {}
        groups[f"group_{number}"] = {**own_format, **_group(kind, targets)}
    return {
        "quant_method": METHOD,
        "format": MIXED if is_mixed else next(iter(formats)),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _targets([name for name in modules if schemes[name] is None], modules),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _class_target(members: list[str]) -> list[str]:
    """Every linear; lm_head by name, as in vLLM it is none."""
    return [*([_HEAD] if _HEAD in members else []), "Linear"]


def _targets(members: Iterable[str], modules: tuple[str, ...]) -> list[str]:
    """Paths and regular expressions that match these of the modules and no others."""
    return [
        rf"re:.*\.{pattern}$" if "." not in pattern and pattern not in modules else pattern
        for pattern in cover(members, modules)
    ]


def _group(scheme: LinearScheme, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if scheme.group_size is None else "group",
            "group_size": scheme.group_size,
            "dynamic": False,
        },
        "input_activations": _activations(scheme),
        "output_activations": None,
    }


def _activations(scheme: LinearScheme) -> dict[str, Any] | None:
    """Per token, from each row as it comes; per tensor, with a scale that is in the checkpoint."""
    if scheme.activation_dtype is None:
        return None
    is_static = scheme.act_granularity == "per_tensor"
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "tensor" if is_static else "token",
        "group_size": None,
        "dynamic": not is_static,
    }
