"""From a layout to what is done to each decoder layer."""

from __future__ import annotations

import torch

from parallel.calibration.limits import activations, layer_schemes, scale_dtypes
from parallel.calibration.result import MODULES
from parallel.checkpoint.layout import Layout
from quant.inputs import INPUTS
from quant.methods.gptq import GPTQArguments
from quant.methods.ptq import Recipe
from quant.numeric import Grid
from quant.scheme import QuantScheme


def recipe_of(layout: Layout, index: int) -> Recipe | None:
    """What is done to a decoder layer; None: nothing of it is quantized.

    Args:
        layout: one that limits.check_layers has passed.
    """
    scheme = layout.scheme
    rows = layer_schemes(layout, index)
    key_values = scheme.kvcache_quant_granularity if scheme.kvcache_dtype else None
    if not rows and key_values is None:
        return None
    names = {name: f"model.layers.{index}.{module}.weight" for name, module in MODULES.items()}
    found = {name: rows[row] for name, row in names.items() if row in rows}
    arguments = scheme.algorithm_args
    return Recipe(
        scale_dtype=getattr(torch, next(iter(scale_dtypes(layout, index)), "float32")),
        grids={name: Grid(item.bits, item.group_size) for name, item in found.items()},
        suppression=scheme.outliers_suppression if found else None,
        folds=tuple(arguments.get("folds", INPUTS)),
        alpha=float(arguments.get("alpha", 0.5)),
        gptq=_gptq(scheme),
        activations=next(iter({activations(item) for item in found.values()}), None),
        key_values=key_values,
    )


def _gptq(scheme: QuantScheme) -> GPTQArguments | None:
    if scheme.precision_recovery != "gptq":
        return None
    known = GPTQArguments.__dataclass_fields__
    return GPTQArguments(**{k: v for k, v in scheme.algorithm_args.items() if k in known})
