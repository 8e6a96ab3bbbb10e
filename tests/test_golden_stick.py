"""Golden Stick's quantized files: the integers, scales and text of what they were written from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher.__main__ import main
from launcher.text import open_tokenizer
from parallel.checkpoint.mindformers.directory import read_model_file
from parallel.checkpoint.open import (
    Checkpoint,
    describe_layout,
    open_checkpoint,
    read_config,
    scheme_to_apply,
)
from parallel.checkpoint.readers.golden_stick import source as golden_stick
from parallel.checkpoint.readers.golden_stick.source import GoldenStickSource
from parallel.checkpoint.source import TensorInfo
from parallel.errors import CheckpointError
from parallel.model.config import ModelConfig
from quant.scheme import QuantScheme
from tests.checkpoints import CONFIG, DEMO, TOKENIZER_FILES, write_checkpoint
from tests.golden_stick import (
    CACHE,
    Write,
    added,
    bits_of,
    fused,
    ptq_06,
    ptq_1,
    ptq_1_dynamic,
    rank_tensors,
    rtn_06,
    their_name,
    their_tensors,
    write_directory,
)
from tests.mindspore_checkpoints import write_ckpt
from tests.models import RTN, generate
from tests.test_export import is_equal
from tests.test_model_files import SHAPE, write_yaml
from tests.test_prepared import merged, prepare
from tests.test_zero_points import round_inputs

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


# Of asymmetric static activations, by linear; those of one input are equal.
ZERO_POINTS = {
    "q_proj": 5, "k_proj": 5, "v_proj": 5, "o_proj": -128, "gate_proj": -21, "up_proj": -21,
    "down_proj": 127,
}  # fmt: skip
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
    """What prepare makes of the origin, with scales and zero points of static inputs that nobody
    calibrated."""
    origin = source if name == "c8" else plain
    truth = merged(prepare(origin, folder / name, 1, CASES[name].quant_scheme()))
    return with_static_inputs(truth) if CASES[name].is_static else truth


def with_static_inputs(truth: dict[str, Tensor]) -> dict[str, Tensor]:
    found = dict(truth)
    for module in [key.removesuffix(".weight_scale") for key in truth if "weight_sc" in key]:
        # Powers of two are what a product's scale can be divided by without rounding.
        power = -5 if module.endswith(("q_proj", "k_proj", "v_proj")) else -6
        found[f"{module}.input_scale"] = torch.tensor([2.0**power])
        zero_point = torch.tensor([ZERO_POINTS[module.rpartition(".")[2]]], dtype=torch.int8)
        found[f"{module}.input_zero_point"] = zero_point
    return found


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

    def said_by(block: dict[str, Any], **shape: Any) -> Callable[[dict[str, TensorInfo]], None]:
        said = read_model_file(write_yaml(tmp_path / "predict.yaml", block, **SIZES, **shape))
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
    infos, open_headers = of_one_layer(headers(tensors)), opens(found.yaml_block(), num_layers=1)
    open_headers(infos)
    for name, info in infos.items():
        others = [
            {key: at for key, at in infos.items() if key != name},
            {**infos, name: replace(info, dtype="int16")},
            {**infos, name: replace(info, shape=(*info.shape[:-1], info.shape[-1] + 2))},
            {**infos, name: replace(info, shape=(*info.shape, 1))},
        ]
        for other in others:
            with pytest.raises(CheckpointError) as error:
                open_headers(other)
            assert "\n" not in str(error.value)


def of_one_layer(infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    return {name: info for name, info in infos.items() if "layers.1" not in name}


W1, W2 = f"{LAYER}feed_forward.w1", f"{LAYER}feed_forward.w2"
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


NAMES = {
    "unknown part": (f"{W1}.matmul.offset", W1, "matmul.offset, which is neither MindFormers' nor"),
    "a part under two names": (
        f"{W1}._weight_quantizer.scale", W1,
        "the scale of model.layers.1.mlp.gate_proj as .*w1._layer.matmul.weight_scale and as"),
    "a part that the scheme has not": (
        f"{W1}.quant_op.input_scale", W1, r"input scale\), but predict.yaml says a scheme without"),
    "a part of what is left alone": (
        "lm_head._layer.matmul.weight_scale", W1, "but predict.yaml leaves lm_head unquantized"),
    "a layer too many": (
        "model.layers.2.feed_forward.w1.weight", W1, "but predict.yaml says a model without it"),
    "a bias of no model": (f"{W1}.bias", W1, r"\(bias\), but predict.yaml says a"),
}  # fmt: skip


@pytest.mark.parametrize("fault", NAMES)
def test_names_that_have_no_place_are_refused(fault, written, opens):
    name, like, message = NAMES[fault]
    infos = headers(written("ptq 1"))
    infos[name] = infos[f"{like}._layer.matmul.weight_scale"]
    with pytest.raises(CheckpointError, match=message):
        opens(CASES["ptq 1"].yaml_block())(infos)


# ---------------------------------------------------------------- what the arithmetic has no place for


def put(name: str, value: object, at: int | None = 3) -> Callable[[dict[str, Tensor]], None]:
    """Change one number of a tensor, or all of them."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][slice(None) if at is None else at] = value

    return edit


def add(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensor

    return edit


PAGED = f"{LAYER}{CACHE}"
IDS = torch.arange(256, dtype=torch.int32)
VALUES = {
    "zero point of a weight": (
        "rtn 0.6", put(f"{W1}._weight_quantizer.zp_neg", 1.0), GATE,
        "w1._weight_quantizer.zp_neg holds zero points of its weight, which must all be 0"),
    "zero point of a group": (
        "ptq 1 w4 g64", put(f"{W1}._layer.matmul.weight_zp", -2.0, 1), GATE,
        "zero points of its weight"),
    "another zero point": (
        "ptq 1 w8a8", put(f"{W2}.quant_op.input_zp", 5, 0), DOWN,
        "quant_bias must hold what makes up for the zero point 5 of .*input_zp, but does not"),
    "zero point of a channel": (
        "ptq 0.6 w8a8", put(f"{W1}.input_zp", 5), GATE,
        "must be one zero point for all channels .* differ from -21 to 5"),
    "zero point that is none": (
        "ptq 1 w8a8", add(f"{W2}.quant_op.input_zp", torch.tensor([0.5])), DOWN,
        r"must be an integer of 8 bits .*but is 0\.5"),
    "zero point of 9 bits": (
        "ptq 1 w8a8", add(f"{W2}.quant_op.input_zp", torch.tensor([128])), DOWN, "but is 128"),
    "bias of zero points": (
        "ptq 1 w8a8", put(f"{W2}._layer.matmul.quant_bias", -4, 0), DOWN, "must hold what makes up"),
    "bias of 0.6": (
        "ptq 0.6 w8a8", put(f"{W1}.weight_bias", 0.5, 255), GATE, "weight_bias must hold what makes"),
    "smoothing": (
        "ptq 1", add(f"{W2}._layer.matmul.smooth_scale", 1 + IDS.float() / 512), DOWN,
        "factors of its input channels"),
    "smoothing in the scale of the input": (
        "ptq 0.6 w8a8", put(f"{W1}.input_scale", 0.5), GATE,
        "must be one scale for all channels of the input, but they differ"),
    "shift": (
        "ptq 1 w8a8", add(f"{W2}.quant_op.beta", IDS.float()), DOWN, "outlier-suppression"),
    "another order": (
        "ptq 1", add(f"{W2}._layer.matmul.perm", IDS.flip(0)), DOWN, "in another order"),
    "scale that is none": (
        "ptq 1", put(f"{W1}._layer.matmul.weight_scale", float("nan")), GATE, "must hold finite"),
    "negative scale": ("ptq 0.6", put(f"{W1}.matmul.t_scale", -0.5), GATE, "not negative"),
    "infinite scale of a product": (
        "ptq 1 w8a8", put(f"{W1}._layer.matmul.dequant_scale", float("inf")), GATE, "must hold finite"),
    "bits that are no scale": (
        "ptq 0.6 w8a8", put(f"{W1}.matmul.dequant_scale", 1 << 40), GATE, "bits of positive float32"),
    "no scale of the input": (
        "ptq 1 w8a8", put(f"{W1}.quant_op.input_scale", 0.0, None), GATE, "finite scales above zero"),
    "scales that do not multiply": (
        "ptq 1 w8a8", add(f"{W1}._layer.matmul.weight_scale", torch.ones(256)), GATE,
        "dequant_scale must be .*input_scale times .*weight_scale, but is not"),
    "zero point of keys": ("c8", put(f"{PAGED}key_t_zp", 1.0), "k", "zero points of the KV cache"),
    "copy of other keys": (
        "c8", add(f"{PAGED}_key_input_quantizer.t_scale", torch.ones(64)), "k",
        "t_scale must hold the scales of .*key_t_scale, but does not"),
    "copy of other values in one": (
        "c8", add(f"{PAGED}key_value_t_scale", torch.ones(2, 64)), "k", "key_value_t_scale must hold"),
    "zero point of both": (
        "c8", add(f"{PAGED}key_value_t_zp", torch.ones(2, 64, dtype=torch.int32)), "k", "zero points"),
}  # fmt: skip


def read_whole(path: Path, module: str) -> dict[str, Tensor]:
    """All that a source has of a linear, or of the last layer's KV cache."""
    source = open_checkpoint(path).source
    prefix = f"{LAYER}self_attn.k_scale" if module == "k" else f"{module}."
    return {
        name: source.read(name, tuple(slice(0, length) for length in info.shape))
        for name, info in source.tensors.items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("fault", VALUES)
def test_values_that_cannot_be_computed_with_are_refused(fault, written, tmp_path):
    name, edit, module, message = VALUES[fault]
    tensors = dict(written(name))
    edit(tensors)
    path = write_directory(tmp_path / "gs", tensors, MODEL, CASES[name].yaml_block())
    with pytest.raises(CheckpointError, match=message):
        read_whole(path, module)


def both_scales(tensors: dict[str, Tensor]) -> Tensor:
    pair = [tensors[f"{PAGED}{word}_t_scale"] for word in ("key", "value")]
    return torch.stack([bits_of(scale) for scale in pair])


NEUTRAL = {
    "ptq 1": {
        f"{W2}._layer.matmul.smooth_scale": lambda _: torch.ones(256),
        f"{W2}._layer.matmul.perm": lambda _: IDS,
    },
    "ptq 1 w8a8": {
        f"{W2}.quant_op.beta": lambda _: torch.zeros(256),
        f"{W2}._layer.matmul.weight_zp": lambda _: torch.zeros(128),
        f"{W2}.quant_op.smooth_scale": lambda _: torch.ones(256),
    },
    "c8": {
        f"{PAGED}key_value_t_scale": both_scales,
        f"{PAGED}key_value_t_zp": lambda _: torch.zeros(2, 64, dtype=torch.int32),
        f"{PAGED}_key_input_quantizer.t_scale": lambda held: held[f"{PAGED}key_t_scale"],
        f"{PAGED}_value_input_quantizer.t_zp": lambda _: torch.zeros(64, dtype=torch.int8),
    },
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_parts_that_change_nothing_are_accepted(name, written, tmp_path):
    plainly, more = dict(written(name)), dict(written(name))
    more |= {key: make(plainly) for key, make in NEUTRAL[name].items()}
    paths = [
        write_directory(tmp_path / word, tensors, MODEL, CASES[name].yaml_block())
        for word, tensors in (("plainly", plainly), ("more", more))
    ]
    for module in (DOWN, "k"):
        assert is_equal(*(read_whole(path, module) for path in paths))


@pytest.mark.parametrize("name", ["ptq 0.6 w8a8", "ptq 1 w8a8"])
def test_scale_of_a_product_gives_the_weights_scale_to_a_rounding(name, written, tmp_path):
    """Of an input scale that is no power of two, and of a weight's that has all bits."""
    tensors = dict(written(name))
    key = next(key for key in tensors if key.startswith(W1) and key.endswith("input_scale"))
    product = next(key for key in tensors if key.startswith(W1) and key.endswith("dequant_scale"))
    scale = torch.full_like(tensors[key], 0.0371)
    weight = torch.rand(256, generator=torch.Generator().manual_seed(0)) / 100 + 1e-4
    tensors[key] = scale
    found = weight * scale[0].float()
    tensors[product] = bits_of(found) if tensors[product].dtype == torch.int64 else found
    if name == "ptq 0.6 w8a8":
        values, zero_point = tensors[f"{W1}.weight"], ZERO_POINTS["gate_proj"]
        tensors[f"{W1}.weight_bias"] = (-added(values, zero_point) * found).half()
    path = write_directory(tmp_path / "gs", tensors, MODEL, CASES[name].yaml_block())
    read = read_whole(path, GATE)
    assert read[f"{GATE}.input_scale"] == scale[0].float()
    # One rounding when it was multiplied, one now that it is divided.
    assert ((read[f"{GATE}.weight_scale"][:, 0] - weight).abs() <= 2 * 2.0**-24 * 2 * weight).all()


# -------------------------------------------------------------------------------------------- ranks


def test_scale_of_a_part_of_a_row_is_refused(written, tmp_path):
    path = write_directory(
        tmp_path / "gs", written("ptq 1"), MODEL, CASES["ptq 1"].yaml_block(), size=2
    )
    held = rank_tensors(written("ptq 1"), 1, 2)
    put(f"{W2}._layer.matmul.weight_scale", 0.25)(held)
    write_ckpt(path / "rank_1" / "rtn-a16w8.ckpt", held)
    with pytest.raises(
        CheckpointError, match="differs on rank 1: each rank has scaled its own part"
    ):
        read_whole(path, DOWN)
    assert read_whole(path, GATE)


@pytest.mark.parametrize("how", ["its own share", "all of it on one", "all of it on each"])
def test_what_makes_up_for_a_zero_point_may_be_shared_by_ranks(how, written, tmp_path):
    """Of the rows of w2, whose columns two ranks have; whatever they hold, it is counted once."""
    tensors, name = written("ptq 1 w8a8"), f"{W2}._layer.matmul.quant_bias"
    block = CASES["ptq 1 w8a8"].yaml_block()
    path = write_directory(tmp_path / "gs", tensors, MODEL, block, size=2)
    for rank in range(2):
        held = rank_tensors(tensors, rank, 2)
        if how == "its own share":
            held[name] = -added(held[f"{W2}._layer.weight"], ZERO_POINTS["down_proj"])
        elif how == "all of it on one" and rank == 1:
            held[name] = torch.zeros_like(held[name])
        write_ckpt(path / f"rank_{rank}" / "rtn-a16w8.ckpt", held)
    assert read_whole(path, DOWN)[f"{DOWN}.input_zero_point"].item() == 127
    held[name] = held[name] + 1
    write_ckpt(path / "rank_1" / "rtn-a16w8.ckpt", held)
    with pytest.raises(CheckpointError, match="must hold what makes up for the zero point 127"):
        read_whole(path, DOWN)


@pytest.mark.parametrize("size", [1, 2])
def test_biases_that_were_added_to_are_those_of_the_model_again(size, tmp_path):
    """Where the model has a bias, what makes up for a zero point has been added to it."""
    origin = write_checkpoint(tmp_path / "hf", architectures=["Qwen2ForCausalLM"], **SIZES)
    case = CASES["ptq 1 w8a8"]
    truth = with_static_inputs(merged(prepare(origin, tmp_path / "tp1", 1, case.quant_scheme())))
    tensors = their_tensors(truth, ptq_1)
    for key in [key for key in tensors if key.endswith(".bias")]:
        module = key.removesuffix(".bias")
        correction = tensors.pop(f"{module}._layer.matmul.quant_bias")
        tensors[key] = tensors[key] + correction * tensors[f"{module}._layer.matmul.dequant_scale"]
    model = {**MODEL, "qkv_has_bias": True}
    path = write_directory(tmp_path / "gs", tensors, model, case.yaml_block(), size=size)
    again = merged(prepare(path, tmp_path / "again", 4, QuantScheme()))
    biases = {name for name in truth if name.endswith(".bias")}
    assert len(biases) == 6
    for name in biases:
        # Sums of hundreds, times a scale of 1e-4 or less: as large as the biases, in float32.
        torch.testing.assert_close(again[name], truth[name], rtol=0, atol=2e-7)
        assert not torch.allclose(tensors[their_name(name)], truth[name], atol=1e-3)
    rest = truth.keys() - biases
    assert is_equal({n: again[n] for n in rest}, {n: truth[n] for n in rest})


@pytest.mark.parametrize(
    ("name", "size", "tps"), [("ptq 0.6 w8a8", 1, (2,)), ("ptq 1 w8a8", 2, (1, 4))]
)
def test_text_of_asymmetric_activations_is_that_of_the_model_in_float64(
    name, size, tps, source, plain, written, tmp_path
):
    """Whole and by rank; the judge is transformers' model with inputs rounded as theirs are."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float64)
    prompt, block = [1, 7, 30], CASES[name].yaml_block()
    round_inputs(model, truth_of(name, source, plain, tmp_path))
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
    path = write_directory(tmp_path / "gs", written(name), MODEL, block, size=size)
    planned = describe_layout(path, QuantScheme(), {}, vocab_emb_dp=False)
    opened = open_checkpoint(path).layout(QuantScheme())
    assert [part.name for part in planned.tensors] == [part.name for part in opened.tensors]
    for tp in tps:
        found = generate(path, [prompt], tp, new_tokens=8)[0].token_ids
        assert list(found) == out[0].tolist()[len(prompt) :]


def test_rank_that_lacks_a_part_is_refused(written, tmp_path):
    path = write_directory(
        tmp_path / "gs", written("ptq 1"), MODEL, CASES["ptq 1"].yaml_block(), size=2
    )
    held = rank_tensors(written("ptq 1"), 1, 2)
    del held[f"{W2}._layer.weight"]
    write_ckpt(path / "rank_1" / "rtn-a16w8.ckpt", held)
    with pytest.raises(CheckpointError, match=r"rank_1 must hold .* lacks .*w2._layer.weight"):
        open_checkpoint(path)


def test_groups_that_a_rank_cannot_have_whole_are_refused(written, tmp_path):
    """Two ranks have 64 input channels each of o_proj's 128."""
    tensors = {
        name: tensor[None] if name.endswith(("weight_scale", "weight_zp")) else tensor
        for name, tensor in written("ptq 1").items()
    }
    block = {**CASES["ptq 1"].yaml_block(), **G64, "group_size": 128}
    path = write_directory(tmp_path / "gs", tensors, MODEL, block, size=2)
    with pytest.raises(
        CheckpointError, match=r"self_attn.o_proj on a rank must be a multiple of 128"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["ptq 1", "ptq 1 w4 g64", "ptq 1 w8a8"])
@pytest.mark.parametrize("size", [1, 2])
def test_fused_linears_are_those_that_were_sliced_and_then_joined(name, size, written, tmp_path):
    apart = {rank: rank_tensors(written(name), rank, size) for rank in range(size)}
    block = CASES[name].yaml_block()
    path = write_directory(tmp_path / "apart", written(name), MODEL, block, size=size)
    joined = write_directory(tmp_path / "joined", written(name), MODEL, block, size=size)
    for rank, tensors in apart.items():
        folder = joined / f"rank_{rank}" if size > 1 else joined
        write_ckpt(folder / "rtn-a16w8.ckpt", fused(tensors))
    for module in (GATE, f"{LAYER}self_attn.k_proj", f"{LAYER}self_attn.v_proj", DOWN):
        assert is_equal(read_whole(joined, module), read_whole(path, module))


# -------------------------------------------------------------------------------------- the directory


def test_weights_that_nobody_quantized_are_floats_beside_such_a_yaml(plain, tmp_path):
    weights = {their_name(name): at for name, at in load_file(plain / "model.safetensors").items()}
    case = CASES["rtn 0.6"]
    path = write_directory(tmp_path / "gs", weights, MODEL, case.yaml_block())
    assert open_checkpoint(path).own_scheme is None
    said = scheme_to_apply(path)
    assert said is not None
    assert said.scheme == case.quant_scheme()


def test_quantized_files_without_a_yaml_are_read_by_the_scheme_that_is_asked_for(written, tmp_path):
    case = CASES["ptq 1 w4 g64"]
    block = case.yaml_block()
    beside = write_directory(tmp_path / "beside", written("ptq 1 w4 g64"), MODEL, block)
    path = write_directory(tmp_path / "gs", written("ptq 1 w4 g64"), MODEL, block)
    shape = read_config(path)
    (path / "predict.yaml").unlink()
    opened = open_checkpoint(path, shape, scheme=case.quant_scheme())
    assert opened.own_scheme == case.quant_scheme()
    assert opened.source.identity() == open_checkpoint(beside).source.identity()
    with pytest.raises(CheckpointError, match="by `quant`, w8a16, but is uint8"):
        open_checkpoint(path, shape, scheme=RTN)


def test_quantized_files_without_a_scheme_are_refused(written, tmp_path):
    path = write_directory(tmp_path / "gs", written("rtn 0.6"), MODEL, None)
    with pytest.raises(
        CheckpointError, match="Golden Stick has quantized, but no YAML in it says a"
    ):
        open_checkpoint(path)


def test_quant_that_contradicts_is_refused_and_what_agrees_is_taken(written, tmp_path):
    case = CASES["ptq 1 w4 g64"]
    path = write_directory(tmp_path / "gs", written("ptq 1 w4 g64"), MODEL, case.yaml_block())
    checkpoint = open_checkpoint(path)
    assert checkpoint.own_scheme == case.quant_scheme()
    with pytest.raises(CheckpointError, match=r"as w4a16 g64 by its predict.yaml.*for w8a16"):
        checkpoint.layout(RTN)
    agreed = checkpoint.layout(case.quant_scheme())
    planned = describe_layout(path, QuantScheme(), {}, vocab_emb_dp=False)
    assert planned.schemes == agreed.schemes == checkpoint.layout(QuantScheme()).schemes


def test_ranks_of_a_16_bit_model_with_biases_are_joined(tmp_path):
    """Scales in the dtype of the weights, as theirs are; norms in float32."""
    family = {"architectures": ["Qwen2ForCausalLM"], "dtype": torch.float16}
    origin = write_checkpoint(tmp_path / "hf", **family, **SIZES)
    weights = load_file(origin / "model.safetensors")
    mixed = {name: at.float() if "norm" in name else at for name, at in weights.items()}
    save_file(mixed, origin / "model.safetensors")
    truth = merged(prepare(origin, tmp_path / "tp1", 1, RTN))
    model = {**MODEL, "qkv_has_bias": True, "compute_dtype": "float16"}
    tensors, block = their_tensors(truth, rtn_06), CASES["rtn 0.6"].yaml_block()
    path = write_directory(tmp_path / "gs", tensors, model, block, size=2)
    assert is_equal(merged(prepare(path, tmp_path / "again", 4, QuantScheme())), truth)
    assert truth[f"{GATE}.weight_scale"].dtype == torch.float16


def test_opening_and_planning_import_no_torch(written, tmp_path):
    block = CASES["ptq 1 w8a8"].yaml_block()
    path = write_directory(tmp_path / "gs", written("ptq 1 w8a8"), MODEL, block, size=2)
    script = (
        "import sys; from pathlib import Path; from quant.scheme import QuantScheme; "
        "from parallel.checkpoint.open import open_checkpoint, describe_layout; "
        f"path = Path({str(path)!r}); open_checkpoint(path).layout(QuantScheme()); "
        "describe_layout(path, QuantScheme(), {}, vocab_emb_dp=False); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_a_config_json_beside_the_yaml_says_the_shape(written, tmp_path):
    case = CASES["rtn 0.6"]
    path = write_directory(tmp_path / "gs", written("rtn 0.6"), MODEL, case.yaml_block())
    expected = read_whole(path, DOWN)
    (path / "config.json").write_text(json.dumps({**CONFIG, **SIZES, "torch_dtype": "float32"}))
    assert is_equal(read_whole(path, DOWN), expected)
    prepared = prepare(path, tmp_path / "tp1", 1, QuantScheme())
    assert (prepared / "config.json").read_text() == (path / "config.json").read_text()


def test_manifest_says_the_files_and_no_place(written, tmp_path):
    paths = [
        write_directory(
            tmp_path / word, written("ptq 1"), MODEL, CASES["ptq 1"].yaml_block(), size=2
        )
        for word in ("one", "other")
    ]
    found = [open_checkpoint(path).source.identity() for path in paths]
    assert found[0] == found[1]
    assert [*found[0]["files"]] == ["rank_0/rtn-a16w8.ckpt", "rank_1/rtn-a16w8.ckpt"]
    assert str(tmp_path) not in json.dumps(found)


def test_generate_runs_a_directory_of_one_yaml_and_one_ckpt(tmp_path, monkeypatch):
    """The demo model as RTN 0.6 leaves a tied one: lm_head is the embedding."""
    tensors = their_tensors(merged(prepare(DEMO, tmp_path / "tp1", 1, RTN)), rtn_06)
    values = json.loads((DEMO / "config.json").read_text())
    shape = {
        "hidden_size": values["hidden_size"], "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"], "n_kv_heads": values["num_key_value_heads"],
        "vocab_size": values["vocab_size"], "seq_length": values["max_position_embeddings"],
        "intermediate_size": values["intermediate_size"], "tie_word_embeddings": True,
        "compute_dtype": "bfloat16",
    }  # fmt: skip
    path = write_directory(tmp_path / "gs", tensors, shape, CASES["rtn 0.6"].yaml_block())
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO / name, path / name)
    monkeypatch.chdir(tmp_path)
    words = ("generation.max_new_tokens=6", "prompt=Once upon a time", "dtype=float32")
    assert main(["generate", f"checkpoint={path}", *words, "parallel.tp=2", "run_root=runs"]) == 0
    result = next(tmp_path.glob("runs/*/*/result.jsonl")).read_text()
    prompt = open_tokenizer(DEMO).encode("Once upon a time")
    expected = generate(DEMO, [prompt], 1, new_tokens=6, scheme=RTN)[0]
    assert json.loads(result)["token_ids"] == list(expected.token_ids)
    assert "weight_dtype: int8" in next(tmp_path.glob("runs/*/*/run.yaml")).read_text()
