"""Golden Stick's quantized files: the integers, scales and text of what they were written from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.scheme import QuantScheme
from tests.checkpoints import write_checkpoint
from tests.golden_stick import (
    Write,
    ptq_06,
    ptq_1,
    ptq_1_dynamic,
    rtn_06,
    their_tensors,
    write_directory,
)
from tests.models import generate
from tests.test_export import is_equal
from tests.test_model_files import SHAPE
from tests.test_prepared import merged, prepare

SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 96}
MODEL = {**SHAPE, **SIZES}
LAYER = "model.layers.1."
PROMPTS = [[1, 7, 30], [1, 5]]
W8 = {"quant_method": "rtn", "weight_dtype": "int8"}
G64 = {"weight_quant_granularity": "per_group", "group_size": 64}


@dataclass(frozen=True)
class Case:
    """A form of theirs, and the scheme that both its YAML and `prepare` are given."""

    write: Write
    scheme: dict[str, Any]
    left_out: tuple[str, ...] = ("lm_head",)
    block: dict[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        return 4 if self.scheme["weight_dtype"] == "int4" else 8

    @property
    def is_static(self) -> bool:
        return self.block.get("act_quant_granularity") == "per_tensor"

    def quant_scheme(self) -> QuantScheme:
        return QuantScheme(**self.scheme, modules_to_not_convert=self.left_out)

    def yaml_block(self) -> dict[str, Any]:
        return {**self.scheme, **self.block, "modules_to_not_convert": list(self.left_out)}


A8 = {**W8, "activation_dtype": "int8"}
STATIC = {"act_quant_granularity": "per_tensor"}
CASES = {
    "rtn 0.6": Case(rtn_06, W8),
    "ptq 0.6": Case(ptq_06, W8, ("lm_head", "w2")),
    "ptq 0.6 w8a8": Case(ptq_06, A8, ("lm_head", "w2"), STATIC),
    "ptq 0.6 with lm_head": Case(ptq_06, W8, ()),
    "ptq 1": Case(ptq_1, W8),
    "ptq 1 g64": Case(ptq_1, {**W8, **G64}),
    "ptq 1 w4": Case(ptq_1, {**W8, "weight_dtype": "int4"}),
    "ptq 1 w4 g64": Case(ptq_1, {**W8, "weight_dtype": "int4", **G64}),
    "ptq 1 w8a8": Case(ptq_1, A8, ("lm_head",), STATIC),
    "ptq 1 w8a8 dynamic": Case(
        ptq_1_dynamic, A8, ("lm_head",), {"act_quant_granularity": "per_token"}
    ),
    "c8": Case(ptq_1, {**W8, "kvcache_dtype": "int8", "kvcache_quant_granularity": "per_channel"}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """float32, so that a scale that is told by a product has the dtype of the others."""
    path = write_checkpoint(tmp_path_factory.mktemp("source") / "hf", **SIZES)
    weights = load_file(path / "model.safetensors")
    for layer in range(2):
        for letter in "kv":
            scale = 2.0 ** -torch.arange(3, 7).repeat(8)
            weights[f"model.layers.{layer}.self_attn.{letter}_scale"] = scale
    save_file(weights, path / "scales.safetensors")
    (path / "scales.safetensors").rename(path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):
    """The same without scales of a KV cache, which nobody may ignore."""
    path = write_checkpoint(tmp_path_factory.mktemp("plain") / "hf", **SIZES)
    weights = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "_scale" not in name}
    save_file(kept, path / "model.safetensors")
    return path


@pytest.fixture(scope="module", params=CASES)
def case(request, source, plain, tmp_path_factory):
    """Name, case, its origin, what prepare makes of that, and Golden Stick's tensors of it."""
    found = CASES[request.param]
    origin = source if request.param == "c8" else plain
    folder = tmp_path_factory.mktemp("truth")
    truth = merged(prepare(origin, folder / "tp1", 1, found.quant_scheme()))
    if found.is_static:
        for module in [name.removesuffix(".weight_scale") for name in truth if "weight_sc" in name]:
            # Powers of two are what a product's scale can be divided by without rounding.
            power = -5 if module.endswith(("q_proj", "k_proj", "v_proj")) else -6
            truth[f"{module}.input_scale"] = torch.tensor([2.0**power])
    return found, origin, truth, their_tensors(truth, found.write, found.bits)


@pytest.mark.parametrize("size", [1, 2])
def test_integers_and_scales_are_those_that_were_written(case, size, tmp_path):
    found, _, truth, tensors = case
    path = write_directory(tmp_path / "gs", tensors, MODEL, found.yaml_block(), size=size)
    again = prepare(path, tmp_path / "again", 2, QuantScheme())
    assert is_equal(merged(again), truth)


@pytest.mark.parametrize("size", [1, 2])
def test_text_is_that_of_quantizing_the_source(case, size, tmp_path):
    found, origin, _, tensors = case
    suffix = ".safetensors" if size == 1 else ".ckpt"
    path = write_directory(
        tmp_path / "gs", tensors, MODEL, found.yaml_block(), size=size, suffix=suffix
    )
    texts = generate(path, PROMPTS, 2, new_tokens=8)
    if found.is_static:
        origin, how = prepare(path, tmp_path / "prepared", 4, QuantScheme()), {}
    else:
        how = {"scheme": found.quant_scheme()}
    assert texts == generate(origin, PROMPTS, 1, new_tokens=8, **how)
