"""What a walk over the decoder layers cannot make of a layout. Needs no torch."""

from __future__ import annotations

from parallel.checkpoint.layout import SCALE_SUFFIX, Layout
from parallel.model.placements import HEAD
from quant.errors import QuantError
from quant.inputs import INPUTS
from quant.scheme import LinearScheme, QuantScheme


def check_layers(layout: Layout) -> None:
    """Raise QuantError for a layer that calibration takes no way through, or a part of the method
    that no layer has a use for."""
    head = layout.schemes.get(HEAD)
    if head is not None and activations(head) == "per_tensor":
        raise QuantError(
            "`quant.act_quant_granularity` is per_tensor, but lm_head, which no decoder layer holds, "
            "would need a static scale too; name lm_head in quant.modules_to_not_convert."
        )
    for index in range(layout.config.num_hidden_layers):
        schemes = layer_schemes(layout, index)
        _check_activations(index, schemes)
        _check_dtypes(layout, index, schemes)
    found = [layer_schemes(layout, index) for index in range(layout.config.num_hidden_layers)]
    _check_effects(
        layout.scheme, {name: item for schemes in found for name, item in schemes.items()}
    )


def layer_schemes(layout: Layout, index: int) -> dict[str, LinearScheme]:
    """Of the quantized rows of a decoder layer, by name."""
    prefix = f"model.layers.{index}."
    return {name: found for name, found in layout.schemes.items() if name.startswith(prefix)}


def scale_dtypes(layout: Layout, index: int) -> set[str]:
    """Of a layer's stored weight scales: the checkpoint's dtype."""
    names = {name + SCALE_SUFFIX for name in layer_schemes(layout, index)}
    return {part.dtype for part in layout.tensors if part.name in names}


def activations(scheme: LinearScheme) -> str | None:
    """per_token, per_tensor (static), or None: floats."""
    return None if scheme.activation_dtype is None else scheme.act_granularity


def _check_activations(index: int, schemes: dict[str, LinearScheme]) -> None:
    kinds = {activations(scheme) for scheme in schemes.values()}
    if len(kinds) > 1:
        raise QuantError(
            "`quant.layer_policies` gives the linears of a layer different activations "
            f"({', '.join(sorted(map(str, kinds)))} in layer {index}), but calibration takes one kind "
            "for each layer; give all of them the same."
        )


def _check_effects(scheme: QuantScheme, rows: dict[str, LinearScheme]) -> None:
    """Raise QuantError for a part of the method that changes nothing of the rows of all layers."""
    for key in ("outliers_suppression", "precision_recovery"):
        if getattr(scheme, key) is not None and not rows:
            raise QuantError(
                f"`quant.{key}` is {getattr(scheme, key)}, but no linear of a decoder layer is "
                "quantized, so it would have no effect; drop a pattern of "
                "quant.modules_to_not_convert, or leave it out."
            )
    products = {name.split(".")[-2] for name in rows}
    for name in scheme.algorithm_args.get("folds", ()):
        if products.isdisjoint(INPUTS[name]):
            raise QuantError(
                f"`quant.algorithm_args.folds` has {name}, but no {' or '.join(INPUTS[name])} is "
                "quantized, so its fold would have no effect; drop it, or quantize them."
            )
    is_grouped = any(item.group_size for item in rows.values())
    if scheme.algorithm_args.get("static_groups") and not is_grouped:
        raise QuantError(
            "`quant.algorithm_args.static_groups` is true, which has no effect where no weight has "
            "groups; drop it, or set quant.weight_quant_granularity=per_group."
        )


def _check_dtypes(layout: Layout, index: int, schemes: dict[str, LinearScheme]) -> None:
    found = scale_dtypes(layout, index) if schemes else set()
    if len(found) > 1:
        raise QuantError(
            f"model.layers.{index} has weights of {' and '.join(sorted(found))}, but calibration "
            "stores the scales of a layer in one dtype; save the checkpoint in one."
        )
