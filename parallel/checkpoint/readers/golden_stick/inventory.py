"""Which parts stand in Golden Stick's files, and those that nobody has asked for. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from parallel.checkpoint.readers.golden_stick.forms import CACHE_FORMS
from parallel.checkpoint.readers.golden_stick.names import BIAS, WEIGHT, parse_name
from parallel.checkpoint.readers.golden_stick.places import Place
from parallel.checkpoint.readers.mindformers.files import WeightFiles, common_names
from parallel.checkpoint.source import FLOAT_DTYPES
from parallel.errors import CheckpointError
from parallel.model.placements import HEAD, Table
from quant.scheme import LinearScheme

# Module, kind -> where it stands.
Inventory = dict[str, dict[str, Place]]


def take_inventory(path: Path, ranks: Sequence[WeightFiles], yaml: Path) -> Inventory:
    """All parts by the modules that they belong to.

    Raises:
        CheckpointError: ranks hold different names, a name is not known, a part stands twice, or
            nothing is quantized.
    """
    found: Inventory = {}
    for name in common_names(ranks):
        part = parse_name(name)
        if part is None:
            raise CheckpointError(
                f"{path} holds {name}, which is neither MindFormers' nor a part of a linear "
                "quantized by Golden Stick that is read; save the network's parameters alone."
            )
        for at, module in enumerate(part.modules):
            parts = found.setdefault(module, {})
            if part.kind in parts:
                raise CheckpointError(
                    f"{path} holds the {part.kind} of {module} as {parts[part.kind].stored} and as "
                    f"{name}; keep the files of one checkpoint alone."
                )
            parts[part.kind] = Place(name, part.modules, at)
    _check_quantized(path, found, ranks[0], yaml)
    return found


def check_used_up(
    path: Path,
    left: Inventory,
    table: Table,
    schemes: Mapping[str, LinearScheme | None],
    yaml: Path,
) -> None:
    """Raise CheckpointError for a part that was not taken out of an inventory."""
    if HEAD not in table:  # tied: as in transformers, the embedding is used
        left.get(HEAD.removesuffix(".weight"), {}).pop(WEIGHT, None)
    for module, parts in left.items():
        for kind, place in parts.items():
            raise CheckpointError(
                f"{path} holds {place.stored} ({kind}), but {yaml.name} "
                f"{_contrary(module, kind, schemes)}; use the YAML that it was quantized with."
            )


def _contrary(module: str, kind: str, schemes: Mapping[str, LinearScheme | None]) -> str:
    """What a YAML says that leaves no place for a part."""
    if kind in CACHE_FORMS:
        return "says no kvcache_dtype with a scale per channel"
    if module not in schemes:
        return "says a model without it"
    return (
        "says a scheme without such a part" if schemes[module] else f"leaves {module} unquantized"
    )


def _check_quantized(path: Path, found: Inventory, files: WeightFiles, yaml: Path) -> None:
    """A YAML beside weights that nobody has quantized yet."""
    places = [(kind, place) for parts in found.values() for kind, place in parts.items()]
    dtypes = {files.places[place.stored].tensors[place.stored].dtype for _, place in places}
    if all(kind in (WEIGHT, BIAS) for kind, _ in places) and dtypes <= {*FLOAT_DTYPES}:
        raise CheckpointError(
            f"{path}: {yaml.name} says quantization_config, but no tensor of the files is quantized; "
            "take the block out of it, and quantize with quant=rtn_a16w8 or its like."
        )
