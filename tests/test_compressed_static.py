"""Static w8a8 as compressed-tensors: calibrated, prepared, exported, and read back, bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from launcher.resolve import DEMO
from parallel.checkpoint.compressed.config import (
    CompressedLinear,
    format_of,
    write_quantization,
)
from parallel.checkpoint.compressed.groups import read_quantization, to_scheme
from parallel.checkpoint.open import describe_layout, open_checkpoint
from parallel.checkpoint.readers.huggingface import INDEX_NAME
from parallel.checkpoint.store import write_prepared
from parallel.errors import CheckpointError
from parallel.group import LoneGroup
from quant.scheme import LinearScheme, QuantScheme
from tests.checkpoints import write_checkpoint
from tests.models import generate, load, logits, run_ranks
from tests.test_compressed import (
    A8,
    MODULES,
    PROMPTS,
    W4,
    W8,
    Q,
    config_of,
    damage_config,
    damage_tensors,
    judge_text,
    load_judge,
    put,
)
from tests.test_compressed import transformers as transformers
from tests.test_export import SHAPE, export, is_equal, read_all
from tests.test_prepared import merged, prepare
from tests.test_static_activations import STATIC, calibrated

QKV = [Q.replace("q_proj", f"{name}_proj") for name in "qkv"]
A8_STATIC = {**A8, "strategy": "tensor", "dynamic": False}


def prepare_static(source, output):
    checkpoint, made = calibrated(source)
    write_prepared(checkpoint.layout(STATIC), made, 2, output)
    return output


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    source = write_checkpoint(folder / "source", dtype=torch.bfloat16, **SHAPE)
    return prepare_static(source, folder / "tp2")


@pytest.fixture(scope="module")
def exported(prepared, tmp_path_factory):
    return export(prepared, tmp_path_factory.mktemp("exported") / "hf")


@pytest.mark.parametrize("size", [1, 4])
def test_preparing_an_export_gives_the_integers_and_scales_again(
    prepared, exported, tmp_path, size
):
    again = prepare(exported, tmp_path / "again", size, QuantScheme())
    assert is_equal(merged(again), merged(prepared))
    found, expected = (open_checkpoint(path).layout(QuantScheme()) for path in (again, prepared))
    assert found.schemes == expected.schemes
    assert LinearScheme("int8", None, "int8", "per_tensor") in found.schemes.values()


def test_an_export_generates_the_text_of_what_it_was_made_of(prepared, exported):
    expected = generate(prepared, [[1, 7], [1]], 2, new_tokens=15)
    for size in (1, 4):
        assert generate(exported, [[1, 7], [1]], size, new_tokens=15) == expected


def test_zero_points_and_scalars_of_old_are_planned_opened_and_change_nothing(exported, tmp_path):
    """Early releases of llm-compressor wrote zero points of symmetric activations, and scalars."""
    path = shutil.copytree(exported, tmp_path / "old")

    def as_of_old(tensors):
        for name in [name for name in tensors if name.endswith("input_scale")]:
            tensors[name] = tensors[name].view(())
            tensors[name.replace("scale", "zero_point")] = torch.zeros(1, dtype=torch.int8)

    damage_tensors(path, as_of_old)
    weight_map = dict.fromkeys(read_all(path), "shard.safetensors")
    (path / "model.safetensors").rename(path / "shard.safetensors")
    (path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    planned = describe_layout(path, QuantScheme(), {}, vocab_emb_dp=False)
    assert planned.schemes == open_checkpoint(path).layout(QuantScheme()).schemes
    assert generate(path, [[1]], 2) == generate(exported, [[1]], 2)


@pytest.mark.parametrize("rest", [LinearScheme("int8"), LinearScheme("int8", None, "int8")])
def test_static_dynamic_and_float_activations_stand_beside_each_other(rest):
    static = LinearScheme("int8", None, "int8", "per_tensor")
    schemes = {name: rest if "mlp" in name else static for name in MODULES[:-1]}
    linears = {name: CompressedLinear(at, format_of(at)) for name, at in schemes.items()}
    config = {"quantization_config": write_quantization({**linears, "lm_head": None})}
    linears = read_quantization(config, MODULES, "config.json")
    found = {name: linear.scheme for name, linear in linears.items() if linear}
    assert found == schemes
    assert to_scheme(linears).for_modules(MODULES) == {**schemes, "lm_head": None}


@pytest.mark.parametrize(
    ("weights", "activations", "says"),
    [
        (W8, {**A8, "dynamic": False}, "dynamic must be true beside its strategy"),
        (W8, {**A8_STATIC, "dynamic": True}, "dynamic must be false beside its strategy"),
        (W8, {**A8_STATIC, "dynamic": "local"}, "dynamic must be true or false"),
        (W8, {**A8, "symmetric": False}, "symmetric must be true .*zero points of each row"),
        (W4, A8_STATIC, "strategy must be token beside weights of 4 bits"),
    ],
)
def test_activations_that_are_not_read_are_refused(weights, activations, says):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    with pytest.raises(CheckpointError, match=f"input_activations.{says}"):
        read_quantization(config_of(group, format="int-quantized"), MODULES, "config.json")


DAMAGED = {
    "missing": (lambda t: t.pop(f"{Q}.input_scale"), f"lacks {Q}.input_scale"),
    "a scale a channel": (put(f"{Q}.input_scale", torch.ones(128)), r"must be .*\[1\].*\[128\]"),
    "integer": (put(f"{Q}.input_scale", torch.ones(1, dtype=torch.int8)), "is int8"),
    "zero point": (put(f"{Q}.input_zero_point", torch.tensor([3], dtype=torch.int8)),
                   f"{Q}.input_zero_point must be 0.*but is 3.*unquantized checkpoint"),
    "float zero point": (put(f"{Q}.input_zero_point", torch.zeros(1)), "is float32"),
    "of no linear": (put("model.norm.input_scale", torch.ones(1)), "model.norm.input_scale"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGED)
def test_damaged_scales_are_refused_when_it_is_opened(fault, exported, tmp_path):
    edit, says = DAMAGED[fault]
    path = shutil.copytree(exported, tmp_path / "damaged")
    damage_tensors(path, edit)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(path).layout(QuantScheme())


def test_scales_that_the_config_does_not_speak_of_are_refused(exported, tmp_path):
    path = shutil.copytree(exported, tmp_path / "damaged")

    def make_dynamic(config):
        for group in config["config_groups"].values():
            group["input_activations"] |= {"strategy": "token", "dynamic": True}

    damage_config(path, make_dynamic)
    with pytest.raises(CheckpointError, match=r"does not know, first .*input_scale"):
        open_checkpoint(path).layout(QuantScheme())


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("size", [1, 2])
def test_scale_that_is_none_is_refused(exported, tmp_path, value, size):
    path = shutil.copytree(exported, tmp_path / "damaged")
    damage_tensors(path, put(f"{Q}.input_scale", torch.tensor([value])))
    with pytest.raises(CheckpointError, match="must be a finite number above zero"):
        run_ranks(size, lambda group: load(open_checkpoint(path), group))
    with pytest.raises(CheckpointError, match="must be a finite number above zero"):
        prepare(path, tmp_path / "again", size, QuantScheme())


def test_parts_of_one_product_with_other_scales_are_refused(exported, tmp_path):
    path = shutil.copytree(exported, tmp_path / "damaged")
    damage_tensors(path, put(f"{QKV[1]}.input_scale", torch.tensor([0.5])))
    with pytest.raises(CheckpointError, match=rf"{QKV[1]}.* must be equal"):
        load(open_checkpoint(path), LoneGroup())


def test_bfloat16_scales_of_llm_compressor_become_float32(exported, tmp_path):
    path = shutil.copytree(exported, tmp_path / "bf16")
    scale = torch.tensor([0.0625], dtype=torch.bfloat16)
    damage_tensors(path, lambda t: t.update({f"{name}.input_scale": scale.clone() for name in QKV}))
    found = merged(prepare(path, tmp_path / "tp2", 2, QuantScheme()))[f"{Q}.input_scale"]
    assert found.dtype == torch.float32
    assert found.tolist() == [0.0625]


def test_quant_that_asks_for_dynamic_activations_is_refused(exported):
    asked = replace(STATIC, act_quant_granularity="per_token", layer_policies=())
    with pytest.raises(CheckpointError, match="is quantized already"):
        open_checkpoint(exported).layout(asked)


def test_transformers_loads_an_export_and_says_the_same(transformers, tmp_path):
    prepared = prepare_static(DEMO, tmp_path / "tp2")
    path = export(prepared, tmp_path / "hf")
    model = load_judge(transformers, path)
    ours = list(generate(prepared, PROMPTS[:1], 2, new_tokens=30)[0].token_ids)
    assert judge_text(model, PROMPTS[0], len(ours)) == ours
    text = PROMPTS[0] + ours
    with torch.no_grad():
        expected = model(torch.tensor([text])).logits[0, :-1]
    # As with dynamic scales: an activation halfway between two steps goes either way.
    torch.testing.assert_close(logits(prepared, text, 2), expected, rtol=0, atol=0.5)
