"""The `quantization_config` of a compressed-tensors checkpoint, read: which linear is held how.

As in compressed-tensors, `ignore` comes first, then a target that is the module's path or a regular
expression of it, then the class, `Linear`. Targets that disagree about a module are refused: the
library and vLLM would settle them each in its own order. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallel.checkpoint.compressed.config import INTEGERS, KEY, MIXED, PACKED, CompressedLinear
from parallel.checkpoint.compressed.fields import ACTIVATIONS, CONFIG, GROUP, WEIGHTS, Place, take
from quant.module_patterns import cover
from quant.scheme import LinearScheme, QuantScheme

_LINEAR = "Linear"


@dataclass(frozen=True)
class _Group:
    targets: tuple[str, ...]
    linear: CompressedLinear
    place: Place


def read_quantization(
    config: Mapping[str, Any], modules: list[str], file: str
) -> dict[str, CompressedLinear | None]:
    """How the checkpoint holds each linear module; None: unquantized.

    Args:
        config: a config.json of which `is_compressed` is true.
        file: what to call it in an error.

    Raises:
        CheckpointError: something in it is not read, contradicts itself, or decides of no module.
    """
    place = Place(file)
    values = take(config[KEY], CONFIG, place)
    groups = [
        _read_group(group, values["format"], place / "config_groups" / name)
        for name, group in values["config_groups"].items()
    ]
    ignored = _matching(values["ignore"] or [], modules, place / "ignore")
    for group in groups:
        _check_targets(group, modules)
    found = {name: None if name in ignored else _of_module(groups, name, place) for name in modules}
    if not any(found.values()):
        raise (place / "config_groups").refuse(
            "must quantize a linear that ignore leaves", values["config_groups"]
        )
    return found


def to_scheme(linears: Mapping[str, CompressedLinear | None]) -> QuantScheme:
    """What `quant.*` would say of such modules: the commonest scheme, and policies for the rest.

    The method that chose the integers is not known; `rtn` stands for it, and changes none of them.
    """
    schemes = {name: linear.scheme if linear else None for name, linear in linears.items()}
    kinds = [scheme for scheme in schemes.values() if scheme is not None]
    ordered = sorted(dict.fromkeys(kinds), key=kinds.count, reverse=True)
    members = {kind: [name for name in schemes if schemes[name] == kind] for kind in ordered}
    left_out = cover([name for name in schemes if schemes[name] is None], schemes)
    policies = [
        {"pattern": pattern, **_fields(kind)}
        for kind in ordered[1:]
        for pattern in cover(members[kind], schemes)
    ]
    return QuantScheme(
        quant_method="rtn",
        modules_to_not_convert=tuple(left_out),
        layer_policies=tuple(policies),
        **_fields(ordered[0]),
    )


def _fields(kind: LinearScheme) -> dict[str, Any]:
    return {
        "weight_dtype": kind.weight_dtype,
        "weight_quant_granularity": "per_channel" if kind.group_size is None else "per_group",
        "group_size": kind.group_size,
        "activation_dtype": kind.activation_dtype,
        "act_quant_granularity": kind.act_granularity,
    }


def _read_group(group: Any, format_of_all: str, place: Place) -> _Group:
    if not isinstance(group, dict):
        raise place.refuse("must be an object (names of presets are not read)", group)
    values = take(group, GROUP, place)
    weights = take(values["weights"], WEIGHTS, place / "weights")
    activations = values["input_activations"]
    own_format = values["format"] or format_of_all
    if own_format not in (PACKED, INTEGERS):
        raise (place / "format").refuse(f"must be said where that of all is {MIXED}", None)
    if own_format == PACKED and activations is not None:
        raise (place / "input_activations").refuse(f"must be null beside {PACKED}", activations)
    said = {}
    if activations is not None:
        said = take(activations, ACTIVATIONS, place / "input_activations")
    scheme = LinearScheme(
        f"int{weights['num_bits']}",
        _group_size(weights, place / "weights"),
        **_activations(said, weights["num_bits"], place / "input_activations"),
    )
    linear = CompressedLinear(scheme, own_format, is_asymmetric=not said.get("symmetric", True))
    return _Group(tuple(values["targets"]), linear, place)


def _activations(said: Mapping[str, Any], weight_bits: int, place: Place) -> dict[str, str]:
    """The fields of a LinearScheme: each row's own scale, or one that calibration gave."""
    if not said:
        return {}
    is_static = said["strategy"] == "tensor"
    if said["dynamic"] is is_static:
        word = "false" if is_static else "true"
        raise (place / "dynamic").refuse(f"must be {word} beside its strategy", said["dynamic"])
    if not is_static and not said["symmetric"]:
        raise (place / "symmetric").refuse(
            "must be true beside strategy token (zero points of each row are not read)", False
        )
    if is_static and weight_bits == 4:
        raise (place / "strategy").refuse("must be token beside weights of 4 bits", "tensor")
    granularity = "per_tensor" if is_static else "per_token"
    return {"activation_dtype": "int8", "act_granularity": granularity}


def _group_size(weights: Mapping[str, Any], place: Place) -> int | None:
    size = weights["group_size"]
    is_grouped = size not in (None, -1)
    if is_grouped != (weights["strategy"] == "group"):
        rule = "must be the columns of a group" if not is_grouped else "must be null"
        raise (place / "group_size").refuse(f"{rule} beside strategy {weights['strategy']}", size)
    return size if is_grouped else None


def _check_targets(group: _Group, modules: list[str]) -> None:
    place = group.place / "targets"
    for target in group.targets:
        if target != _LINEAR and not _matching([target], modules, place):
            raise place.refuse("must name linears of this model, or Linear", target)


def _of_module(groups: list[_Group], name: str, place: Place) -> CompressedLinear | None:
    """The groups that name a module come before those that name its class."""
    by_name = [group for group in groups if any(_matches(name, item) for item in group.targets)]
    hits = by_name or [group for group in groups if _LINEAR in group.targets]
    linears = {hit.linear for hit in hits}
    if len(linears) > 1:
        raise (place / "config_groups").refuse(
            f"must say one thing of {name}", [hit.place.path.rpartition(".")[2] for hit in hits]
        )
    return next(iter(linears), None)


def _matching(targets: list[str], modules: list[str], place: Place) -> set[str]:
    """The modules that targets name; `Linear` names all of them."""
    for target in targets:
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            raise place.refuse(f"must hold regular expressions ({error})", target) from error
    return {
        name
        for name in modules
        if any(target == _LINEAR or _matches(name, target) for target in targets)
    }


def _matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name
