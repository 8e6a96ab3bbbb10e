"""Golden Stick's quantized files: the integers, scales and text of what they were written from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel.checkpoint.mindformers.directory import read_model_file
from parallel.checkpoint.open import Checkpoint, open_checkpoint
from parallel.checkpoint.readers import golden_stick
from parallel.checkpoint.readers.golden_stick import GoldenStickSource
from parallel.checkpoint.source import TensorInfo
from parallel.errors import CheckpointError
from parallel.model.config import ModelConfig
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
from tests.test_model_files import SHAPE, write_yaml
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
            scale = 2.0 ** -torch.arange(3, 7).repeat(16)
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


def truth_of(name: str, source: Path, plain: Path, folder: Path) -> dict[str, Tensor]:
    """What prepare makes of the origin, with scales of static inputs that nobody calibrated."""
    origin = source if name == "c8" else plain
    truth = merged(prepare(origin, folder / name, 1, CASES[name].quant_scheme()))
    if CASES[name].is_static:
        for module in [key.removesuffix(".weight_scale") for key in truth if "weight_sc" in key]:
            # Powers of two are what a product's scale can be divided by without rounding.
            power = -5 if module.endswith(("q_proj", "k_proj", "v_proj")) else -6
            truth[f"{module}.input_scale"] = torch.tensor([2.0**power])
    return truth


def how_of(name: str) -> tuple[Write, int]:
    return CASES[name].write, CASES[name].bits


@pytest.fixture(scope="module", params=CASES)
def case(request, source, plain, tmp_path_factory):
    """Name, case, its origin, what prepare makes of that, and Golden Stick's tensors of it."""
    found = CASES[request.param]
    origin = source if request.param == "c8" else plain
    folder = tmp_path_factory.mktemp("truth")
    truth = truth_of(request.param, source, plain, folder)
    return found, origin, truth, their_tensors(truth, *how_of(request.param))


@pytest.mark.parametrize("size", [1, 2])
def test_integers_and_scales_are_those_that_were_written(case, size, tmp_path):
    found, _, truth, tensors = case
    path = write_directory(tmp_path / "gs", tensors, MODEL, found.yaml_block(), size=size)
    again = prepare(path, tmp_path / "again", 2, QuantScheme())
    assert is_equal(merged(again), truth)


def test_text_is_that_of_quantizing_the_source(case, tmp_path):
    found, origin, _, tensors = case
    path = write_directory(tmp_path / "gs", tensors, MODEL, found.yaml_block(), size=2)
    texts = generate(path, PROMPTS, 2, new_tokens=6)
    if found.is_static:
        origin, how = prepare(path, tmp_path / "prepared", 4, QuantScheme()), {}
    else:
        how = {"scheme": found.quant_scheme()}
    assert texts == generate(origin, PROMPTS, 1, new_tokens=6, **how)


# ------------------------------------------------------------------------------ what is not as said


class Header:
    """A file of which only the names, dtypes and shapes are there."""

    def __init__(self, path: Path, tensors: dict[str, TensorInfo]) -> None:
        self.path, self.tensors = path, tensors


@pytest.fixture
def opens(monkeypatch, tmp_path):
    """Of what a YAML says: opens headers as the file of its directory, and makes the layout."""

    def said_by(block: dict[str, Any]) -> Callable[[dict[str, TensorInfo]], None]:
        said = read_model_file(write_yaml(tmp_path / "predict.yaml", block, **SIZES))
        config = ModelConfig.from_hf(said.config)

        def open_headers(infos: dict[str, TensorInfo]) -> None:
            file = Header(tmp_path / "a.ckpt", infos)
            places = dict.fromkeys(infos, file)
            rank = SimpleNamespace(path=tmp_path, files={"a.ckpt": file}, places=places)
            monkeypatch.setattr(golden_stick, "open_ranks", lambda _: [rank])
            source = GoldenStickSource(tmp_path, config, said)
            Checkpoint(tmp_path, config, source, (2,), {}).layout(QuantScheme())

        return open_headers

    return said_by


def headers(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), "a.ckpt")
        for name, tensor in tensors.items()
    }


def test_each_tensor_that_is_missing_or_of_another_form_is_refused(case, opens):
    found, _, _, tensors = case
    infos, open_headers = headers(tensors), opens(found.yaml_block())
    open_headers(infos)
    for name, info in infos.items():
        if name.startswith("model.layers.0"):
            continue  # of the same forms as the other layer
        others = [
            {key: at for key, at in infos.items() if key != name},
            {**infos, name: replace(info, dtype="int16")},
            {**infos, name: replace(info, shape=(*info.shape[:-1], info.shape[-1] + 2))},
            {**infos, name: replace(info, shape=(*info.shape, 1))},
            {**infos, name: replace(info, shape=())},
            {**infos, f"{name}.more": info},
        ]
        for other in others:
            with pytest.raises(CheckpointError) as error:
                open_headers(other)
            assert "\n" not in str(error.value)


W1 = f"{LAYER}feed_forward.w1"
W2 = f"{LAYER}feed_forward.w2"
GATE, DOWN = f"{LAYER}mlp.gate_proj", f"{LAYER}mlp.down_proj"
CONTRADICTIONS = {
    "int8 files, int4 YAML": (
        "ptq 1", {"weight_dtype": "int4"},
        r"must be uint8 or int8 \[128, 64\] by predict.yaml, w4a16, but is int8 \[128, 128\]"),
    "int4 files, int8 YAML": (
        "ptq 1 w4", {"weight_dtype": "int8"},
        r"must be int8 \[128, 128\] by predict.yaml, w8a16, but is uint8"),
    "groups, YAML a channel": (
        "ptq 1 g64", {"weight_quant_granularity": "per_channel", "group_size": None},
        r"weight_scale must be float32 or float16 or bfloat16 \[128\] by .* but is float32 \[2, 128\]"),
    "a channel, YAML groups": (
        "ptq 1", G64,
        r"weight_scale must be .* \[2, 128\] by predict.yaml, w8a16 g64, but is float32 \[128\]"),
    "other groups": ("ptq 1 g64", {"group_size": 32}, r"\[4, 128\] by predict.yaml, w8a16 g32, but is"),
    "w2 is quantized, YAML leaves it": (
        "rtn 0.6", {"modules_to_not_convert": ["lm_head", "w2"]},
        r"w2.weight must be .* by predict.yaml, which leaves it unquantized, but is int8"),
    "w2 is left, YAML quantizes it": (
        "ptq 0.6", {"modules_to_not_convert": ["lm_head"]},
        r"w2.weight must be int8 \[128, 256\] by predict.yaml, w8a16, but is float32"),
    "lm_head is left, YAML quantizes it": (
        "ptq 1", {"modules_to_not_convert": []}, "lm_head.weight must be int8 .*but is float32"),
    "static activations, YAML none": (
        "ptq 0.6 w8a8", {"activation_dtype": None, "act_quant_granularity": None},
        r"lacks the scale of model.layers.0.self_attn.q_proj, which predict.yaml makes .*w8a16"),
    "no activations, YAML static": (
        "ptq 0.6", {"activation_dtype": "int8"}, r"lacks the input scale of .*w8a8 static"),
    "static activations, YAML dynamic": (
        "ptq 1 w8a8", {"act_quant_granularity": "per_token"}, "lacks the scale of .*, w8a8"),
    "dynamic activations, YAML none": (
        "ptq 1 w8a8 dynamic", {"activation_dtype": None, "act_quant_granularity": None},
        "lacks the zero point of .*w8a16"),
    "static scales of a cache, YAML none": (
        "c8", {"kvcache_dtype": None, "kvcache_quant_granularity": None},
        r"key_t_scale \(key scale\), but predict.yaml says no kvcache_dtype"),
    "YAML with a static cache": (
        "ptq 1", {"kvcache_dtype": "int8"}, "lacks the key scale of model.layers.0.self_attn, which"),
    "4-bit weights beside int8 activations": (
        "ptq 1 w4", {"activation_dtype": "int8", "act_quant_granularity": "per_token"},
        "w4a8 by predict.yaml, and how Golden Stick stores"),
    "pattern of no module": (
        "ptq 1", {"modules_to_not_convert": ["w9"]}, "predict.yaml: quantization_config: .*'w9'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(source, plain, tmp_path_factory):
    """Golden Stick's tensors of a case, by its name."""
    folder, made = tmp_path_factory.mktemp("written"), {}

    def tensors_of(name: str) -> dict[str, Tensor]:
        if name not in made:
            made[name] = their_tensors(truth_of(name, source, plain, folder), *how_of(name))
        return made[name]

    return tensors_of


@pytest.mark.parametrize("fault", CONTRADICTIONS)
def test_yaml_that_contradicts_the_files_is_refused_naming_both(fault, written, opens):
    name, block, message = CONTRADICTIONS[fault]
    infos = headers(written(name))
    with pytest.raises(CheckpointError, match=message):
        opens({**CASES[name].yaml_block(), **block})(infos)
    opens(CASES[name].yaml_block())(infos)
