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
        is_asymmetric: whether its static input has a zero point.
    """

    scheme: LinearScheme
    format: str
    is_asymmetric: bool = False


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


def write_quantization(linears: Mapping[str, CompressedLinear | None]) -> dict[str, Any]:
    """The `quantization_config` of a model.

    Args:
        linears: each linear module; None: it is not quantized, and goes to `ignore`.
    """
    modules = tuple(linears)
    kinds = list(dict.fromkeys(linear for linear in linears.values() if linear is not None))
    formats = {kind.format for kind in kinds}
    is_mixed = len(formats) > 1
    groups = {}
    for number, kind in enumerate(kinds):
        members = [name for name in modules if linears[name] == kind]
        targets = _class_target(members) if len(kinds) == 1 else _targets(members, modules)
        own_format = {"format": kind.format} if is_mixed else {}
        groups[f"group_{number}"] = {**own_format, **_group(kind, targets)}
    return {
        "quant_method": METHOD,
        "format": MIXED if is_mixed else next(iter(formats)),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _targets([name for name in modules if linears[name] is None], modules),
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


def _group(linear: CompressedLinear, targets: list[str]) -> dict[str, Any]:
    scheme = linear.scheme
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
        "input_activations": _activations(linear),
        "output_activations": None,
    }


def _activations(linear: CompressedLinear) -> dict[str, Any] | None:
    """Per token, from each row as it comes; per tensor, with a scale that is in the checkpoint."""
    if linear.scheme.activation_dtype is None:
        return None
    is_static = linear.scheme.is_static
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": not linear.is_asymmetric,
        "strategy": "tensor" if is_static else "token",
        "group_size": None,
        "dynamic": not is_static,
    }
