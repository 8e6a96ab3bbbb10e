"""One cell of schemes times methods: calibrated and prepared at 1, 2 and 4 ranks, and run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from parallel.calibration.limits import check_layers
from parallel.calibration.recipes import recipe_of
from parallel.calibration.result import MODULES
from parallel.calibration.walk import Calibration, calibrate
from parallel.checkpoint.layout import Layout
from parallel.checkpoint.open import open_checkpoint
from parallel.checkpoint.readers.calibrated import CalibratedSource
from parallel.checkpoint.store import write_prepared
from parallel.model.placements import KV_SCALES
from quant.numeric import dequantize, unpack_int4
from quant.scheme import QuantScheme
from tests.models import logits, run_ranks
from tests.test_kv_ranks import rounding_caches
from tests.test_prepared import merged
from tests.test_static_activations import input_rounding

SIZES = (1, 2, 4)
WEIGHTS: Mapping[str, Mapping[str, object]] = {
    "w8": {"weight_dtype": "int8"},
    "w8 g32": {"weight_dtype": "int8", "group_size": 32, "weight_quant_granularity": "per_group"},
    "w4": {"weight_dtype": "int4"},
    "w4 g32": {"weight_dtype": "int4", "group_size": 32, "weight_quant_granularity": "per_group"},
}
ACTIVATIONS: Mapping[str, Mapping[str, object]] = {
    "a16": {},
    "a8": {"activation_dtype": "int8"},
    "a8 static": {"activation_dtype": "int8", "act_quant_granularity": "per_tensor"},
}
CACHES: Mapping[str, Mapping[str, object]] = {
    "": {},
    "c8": {"kvcache_dtype": "int8"},
    "c8 static": {"kvcache_dtype": "int8", "kvcache_quant_granularity": "per_channel"},
}
SMOOTH, AWQ = {"outliers_suppression": "smooth"}, {"outliers_suppression": "awq"}
GPTQ: dict[str, object] = {"precision_recovery": "gptq"}
METHODS: Mapping[str, Mapping[str, object]] = {
    "rtn": {"quant_method": "rtn"},
    "smooth_quant": {"quant_method": "smooth_quant", **SMOOTH},
    "ptq": {"quant_method": "ptq"},
    "smooth": {"quant_method": "ptq", **SMOOTH},
    "awq": {"quant_method": "ptq", **AWQ},
    "gptq": {"quant_method": "ptq", **GPTQ},
    "smooth gptq": {"quant_method": "ptq", **SMOOTH, **GPTQ},
    "awq gptq": {"quant_method": "ptq", **AWQ, **GPTQ},
}


@dataclass(frozen=True)
class Cell:
    """Names of the four tables."""

    weights: str
    activations: str
    cache: str
    method: str

    def scheme(self) -> QuantScheme:
        """Raises QuantError where there is no such thing."""
        return QuantScheme.from_dict({
            **WEIGHTS[self.weights], **ACTIVATIONS[self.activations], **CACHES[self.cache],
            **METHODS[self.method],
        })  # fmt: skip

    @property
    def reference_limit(self) -> float:
        """Of the relative distance from the float64 model that rounds where ours does.

        float32 sums over 2 to 5 layers: 1e-6 was seen. A last bit of them may tip a key into the
        next of 127 steps, or an activation, which the layers after it carry on.
        """
        return {"a16": 2e-3 if self.cache else 1e-5}.get(self.activations, 0.04)

    @property
    def decode_limit(self) -> float:
        """Between one prefill and token after token: sums of attention in another order."""
        return {"a16": 2e-3 if self.cache else 1e-4}.get(self.activations, 0.04)


@dataclass(frozen=True)
class Found:
    """Relative distances, the largest over the sizes."""

    reference: float
    decode: float


def run_cell(path: Path, cell: Cell, samples: list[list[int]], folder: Path) -> Found:
    """Raise AssertionError where integers or scales differ between sizes, or a limit is passed."""
    prepared = {size: _prepare(path, cell.scheme(), samples, size, folder) for size in SIZES}
    tensors = merged(prepared[1])
    for size in SIZES[1:]:
        _check_equal(merged(prepared[size]), tensors, f"{cell} at {size} ranks")
    ids = samples[0]
    expected = _reference(path, cell, tensors, ids)
    whole = {size: logits(prepared[4], ids, size).double() for size in SIZES}
    single = logits(prepared[1], ids, 2, chunk=1).double()
    found = Found(max(_distance(x, expected) for x in whole.values()), _distance(single, whole[2]))
    assert found.reference <= cell.reference_limit, (cell, found)
    assert found.decode <= cell.decode_limit, (cell, found)
    return found


def _prepare(
    path: Path, scheme: QuantScheme, samples: list[list[int]], size: int, folder: Path
) -> Path:
    """What the command does: every rank calibrates, one writes."""
    checkpoint = open_checkpoint(path)
    layout = checkpoint.layout(scheme)
    check_layers(layout)
    work = Calibration(
        checkpoint.config, checkpoint.source, samples, lambda index: recipe_of(layout, index),
        block_samples=2,
    )  # fmt: skip
    state = folder / f"state_{size}"
    run_ranks(size, lambda group: list(calibrate(work, group, state_dir=state)))
    bits = {name: linear.bits for name, linear in layout.schemes.items()}
    files = sorted(state.glob("layer_*.safetensors"))
    source = CalibratedSource(checkpoint.source, files, MODULES, bits, work.identity())
    write_prepared(layout, source, size, folder / f"tp{size}")
    return folder / f"tp{size}"


def _check_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], where: str) -> None:
    assert found.keys() == wanted.keys(), where
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), f"{where}: {name}"


def _reference(path: Path, cell: Cell, tensors: dict[str, Tensor], ids: list[int]) -> Tensor:
    """Logits of transformers in float64, with the weights that the integers stand for, and inputs
    and keys and values rounded by the formula."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    layout = open_checkpoint(path).layout(cell.scheme())
    for name, module in model.named_modules():
        if f"{name}.weight_scale" in tensors:
            module.weight.data = _dequantized(layout, f"{name}.weight", tensors)
            if cell.activations != "a16":
                scale = tensors.get(f"{name}.input_scale")
                module.register_forward_pre_hook(input_rounding(scale))
        elif f"{name}.weight" in tensors:
            module.weight.data = tensors[f"{name}.weight"].double()
        if f"{name}.bias" in tensors:
            module.bias.data = tensors[f"{name}.bias"].double()
    scales = {name: tensors[name].double() for name in tensors if name.endswith(KV_SCALES)}
    with torch.no_grad(), rounding_caches(scales) if cell.cache else nullcontext():
        return model(torch.tensor([ids])).logits[0, :-1]


def _dequantized(layout: Layout, name: str, tensors: dict[str, Tensor]) -> Tensor:
    scheme, columns = layout.schemes[name], layout.table[name].shape[1]
    values = tensors[name] if scheme.bits == 8 else unpack_int4(tensors[name], columns)
    return dequantize(values, tensors[f"{name}_scale"], torch.float64, scheme.group_size)


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
