"""The walk over the decoder layers: the same integers on any number of ranks, and how it goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.calibration.forward import LayerForward
from parallel.calibration.read import embed, read_layer
from parallel.calibration.result import MODULES, CalibratedLayer
from parallel.calibration.samples import deal
from parallel.calibration.walk import Calibration, calibrate
from parallel.checkpoint.open import open_checkpoint
from parallel.errors import CheckpointError
from parallel.group import LoneGroup, SimulatedGroup
from quant.inputs import INPUTS
from quant.methods.gptq import GPTQArguments
from quant.methods.layer import Product, Rounded
from quant.methods.ptq import Recipe
from quant.numeric import Grid, dequantize
from quant.rounding import quantize
from tests.checkpoints import write_checkpoint
from tests.models import run_ranks

PRODUCTS = tuple(MODULES)
FLOATS = Recipe(torch.float32, grids={})
INT8, INT4 = dict.fromkeys(PRODUCTS, Grid(8)), dict.fromkeys(PRODUCTS, Grid(4, 32))
METHODS = {
    "rtn": {},
    "smooth": {"suppression": "smooth"},
    "awq": {"suppression": "awq"},
    "gptq": {"gptq": GPTQArguments()},
    "gptq desc_act": {"gptq": GPTQArguments(desc_act=True, static_groups=True)},
    "awq and gptq": {"suppression": "awq", "gptq": GPTQArguments()},
    "smooth, static": {
        "suppression": "smooth", "activations": "per_tensor", "key_values": "per_channel",
    },
    "dynamic": {"activations": "per_token", "key_values": "per_token"},
}  # fmt: skip


def token_ids(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 2048, (n,), generator=generator).tolist() for n in lengths]


SAMPLES = token_ids(24, 17, 31, 9, 24, 24, 7, 20, 30, 11, 1)


def calibration(path: Path, recipe: Recipe | None, **how) -> Calibration:
    checkpoint = open_checkpoint(path)
    how = {"token_ids": SAMPLES, "block_samples": 2, **how}
    return Calibration(checkpoint.config, checkpoint.source, recipe_of=lambda _: recipe, **how)


def walk(calibration: Calibration, size: int = 1, **how) -> list[list[CalibratedLayer]]:
    """The layers on each rank."""
    return run_ranks(size, lambda group: list(calibrate(calibration, group, **how)))


def assert_equal_layers(found: list[CalibratedLayer], wanted: list[CalibratedLayer]) -> None:
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        tensors, expected = one.to_tensors(), other.to_tensors()
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), f"layer {one.index}: {name}"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Two layers with biases of q, k and v, grouped heads, and a hidden size of two groups."""
    return write_checkpoint(
        tmp_path_factory.mktemp("model"),
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        use_sliding_window=False,
    )


# Any number of ranks


@pytest.mark.parametrize("grids", [INT8, INT4], ids=["int8", "int4 g32"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_tensor_is_the_same_on_1_2_and_4_ranks(model, grids, method):
    work = calibration(model, Recipe(torch.float32, grids, **method))
    alone = walk(work)[0]
    assert len(alone[0].rounded) == 7
    for size in (2, 4):
        for rank in walk(work, size):
            assert_equal_layers(rank, alone)


def test_threads_change_no_bit(model):
    work = calibration(model, Recipe(torch.float32, INT4, gptq=GPTQArguments()))
    assert_equal_layers(walk(work, num_threads=3)[0], walk(work, num_threads=1)[0])


def test_rows_are_divided_among_ranks_without_changing_a_bit(tmp_path):
    """More rows than a block: ranks round different ones, of weights that are no round number."""
    path = write_checkpoint(tmp_path, intermediate_size=600, num_hidden_layers=1)
    work = calibration(path, Recipe(torch.float32, INT4, gptq=GPTQArguments()))
    alone = walk(work)[0]
    for rank in walk(work, 2) + walk(work, 4):
        assert_equal_layers(rank, alone)


def test_a_rank_without_samples_takes_part(model):
    work = calibration(
        model, Recipe(torch.float32, INT8, **METHODS["awq"]), token_ids=SAMPLES[:2], block_samples=1
    )
    assert_equal_layers(walk(work, 4)[3], walk(work)[0])


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_samples_are_dealt_out_in_blocks_one_after_the_other(size):
    rounds = [deal(11, 2, SimulatedGroup(rank, size)) for rank in range(size)]
    assert len({len(mine) for mine in rounds}) == 1, "every rank takes part in every round"
    in_order = [index for blocks in zip(*rounds, strict=True) for b in blocks for index in b]
    assert in_order == list(range(11))


# What the layers become


def test_the_hidden_states_are_those_of_transformers(model):
    """With nothing to quantize the walk is the model's own forward pass."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = reference.model(torch.tensor([SAMPLES[2]]), output_hidden_states=True)
    work = calibration(model, None)
    forward = LayerForward(work.config, torch.float32, 31)
    hidden = embed(work.source, {2: SAMPLES[2]}, torch.float32)[2]
    assert torch.equal(hidden, wanted.hidden_states[0][0])
    middle = forward.run(read_layer(work.source, work.config, 0), hidden)
    # Two orders of the same float32 sums.
    assert torch.allclose(middle, wanted.hidden_states[1][0], atol=2e-5)


def test_rtn_is_each_weight_by_itself(model):
    """Nothing of the samples goes into it, and no float is changed."""
    weights = load_file(model / "model.safetensors")
    for layer in walk(calibration(model, Recipe(torch.bfloat16, INT4)))[0]:
        assert not layer.floats
        for name, rounded in layer.rounded.items():
            weight = weights[f"model.layers.{layer.index}.{MODULES[name]}.weight"]
            values, scale = quantize(weight, Grid(4, 32), torch.bfloat16)
            assert torch.equal(rounded.values_NK, values)
            assert torch.equal(rounded.scale_NG, scale)


def test_the_error_is_that_of_the_layer_that_was_returned(model):
    """Told from the tensors alone, as whoever loads them would put the layer together."""
    work = calibration(model, Recipe(torch.float32, INT4, suppression="awq"))
    found = walk(work)[0][0]
    layer = read_layer(work.source, work.config, 0)
    rounded = read_layer(work.source, work.config, 0)
    for name, weight in found.rounded.items():
        bias = found.floats.get(f"{MODULES[name]}.bias", layer.products[name].bias_N)
        whole = dequantize(weight.values_NK, weight.scale_NG, torch.float32, weight.group_size)
        rounded.products[name] = Product(whole, bias)
    for name in rounded.norms:
        rounded.norms[name] = found.floats[f"{name}.weight"]
    forward = LayerForward(work.config, torch.float32, 31)
    hidden = embed(work.source, dict(enumerate(SAMPLES)), torch.float32)
    wanted = torch.cat([forward.run(layer, x) for x in hidden.values()]).double()
    out = torch.cat([forward.run(rounded, x) for x in hidden.values()]).double()
    # Of float32 outputs whose sums have another order.
    assert found.error.relative == pytest.approx(float((out - wanted).norm() / wanted.norm()), 1e-4)
    cosine = float((out * wanted).sum() / out.norm() / wanted.norm())
    assert found.error.cosine == pytest.approx(cosine, 1e-6)


def test_the_next_layer_sees_what_the_rounded_one_gives(model):
    """Layer 1 is calibrated on the outputs of layer 0 as it has become."""
    recipe = Recipe(torch.float32, INT4, suppression="smooth")
    work = calibration(model, recipe)
    after_rounded = walk(work)[0][1]
    after_float = walk(replace(work, recipe_of=lambda index: recipe if index else None))[0][1]
    name = "input_layernorm.weight"
    assert not torch.equal(after_rounded.floats[name], after_float.floats[name])
    assert torch.allclose(after_rounded.floats[name], after_float.floats[name], rtol=0.3)


def test_a_product_left_out_keeps_its_floats_but_for_the_fold(model):
    grids = {name: Grid(8) for name in PRODUCTS if name not in ("down_proj", "v_proj")}
    layer = walk(calibration(model, Recipe(torch.float32, grids, suppression="smooth")))[0][0]
    assert set(layer.rounded) == set(grids)
    weights = load_file(model / "model.safetensors")
    stored = weights["model.layers.0.self_attn.v_proj.weight"]
    # v_proj takes up the scales of its own input and of o_proj; down_proj's input was not folded.
    assert not torch.equal(layer.floats["self_attn.v_proj.weight"], stored)
    assert "mlp.down_proj.weight" not in layer.floats


def test_folds_are_left_out_by_name(model):
    recipe = Recipe(torch.float32, INT8, suppression="smooth", folds=("qkv_proj", "gate_up_proj"))
    layer = walk(calibration(model, recipe))[0][0]
    assert set(layer.floats) == {"input_layernorm.weight", "post_attention_layernorm.weight"}


def test_static_scales_are_the_largest_values_over_127(model):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    work = calibration(model, replace(FLOATS, key_values="per_channel"))
    layer = walk(work)[0][0]
    keys, values = [], []
    for ids in SAMPLES:
        with torch.no_grad():
            cache = reference.model(torch.tensor([ids])).past_key_values.layers[0]
        keys.append(cache.keys[0]), values.append(cache.values[0])
    for scale, seen in ((layer.key_scale, keys), (layer.value_scale, values)):
        wanted = torch.cat(seen, dim=1).abs().amax(dim=1) / 127
        assert torch.allclose(scale, wanted, rtol=1e-5)


def test_the_scale_of_a_static_input_is_shared_by_its_products(model):
    layer = walk(calibration(model, Recipe(torch.float32, INT8, activations="per_tensor")))[0][0]
    assert set(layer.input_scales) == set(PRODUCTS)
    for products in INPUTS.values():
        assert len({float(layer.input_scales[name]) for name in products}) == 1
    norm = load_file(model / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    work = calibration(model, None)
    hidden = torch.cat(list(embed(work.source, dict(enumerate(SAMPLES)), torch.float32).values()))
    normed = norm * hidden * (hidden.square().mean(dim=1, keepdim=True) + 1e-5).rsqrt()
    assert float(layer.input_scales["q_proj"]) == pytest.approx(
        float(normed.abs().max()) / 127, 1e-6
    )


# Quality


@pytest.fixture(scope="module")
def outliers(tmp_path_factory) -> Path:
    """A model some of whose channels are thirty times as large as the others, as in real ones."""
    path = write_checkpoint(
        tmp_path_factory.mktemp("outliers"), hidden_size=128, num_hidden_layers=1
    )
    weights = load_file(path / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("layernorm.weight"):
            weight[[3, 40, 77, 101]] *= 30
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def error_of(path: Path, recipe: Recipe) -> float:
    return walk(calibration(path, recipe))[0][0].error.relative


def test_awq_beats_rounding_to_nearest_where_channels_are_salient(outliers):
    plain = error_of(outliers, Recipe(torch.float32, INT4))
    assert error_of(outliers, Recipe(torch.float32, INT4, suppression="awq")) < 0.8 * plain


def test_awq_judges_o_and_down_by_themselves(outliers):
    """The scales of q, k, v, gate and up, which the norms before them divide, have no say in theirs."""

    def rounded(*folds: str) -> dict[str, Rounded]:
        recipe = Recipe(torch.float32, INT4, suppression="awq", folds=folds)
        return dict(walk(calibration(outliers, recipe))[0][0].rounded)

    together, alone = rounded(*INPUTS), rounded("o_proj", "down_proj")
    for name in ("o_proj", "down_proj"):
        assert torch.equal(together[name].values_NK, alone[name].values_NK), name
        assert torch.equal(together[name].scale_NG, alone[name].scale_NG), name


def test_smooth_quant_beats_plain_int8_activations_where_channels_are_outliers(outliers):
    recipe = Recipe(torch.float32, INT8, activations="per_tensor")
    plain = error_of(outliers, recipe)
    assert error_of(outliers, replace(recipe, suppression="smooth")) < 0.5 * plain


def test_gptq_beats_rounding_to_nearest(model):
    plain = walk(calibration(model, Recipe(torch.float32, INT4)))[0]
    better = walk(calibration(model, Recipe(torch.float32, INT4, gptq=GPTQArguments())))[0]
    for one, other in zip(better, plain, strict=True):
        assert one.error.relative < 0.8 * other.error.relative


# Going on


@pytest.mark.parametrize("size", [1, 2])
def test_an_interrupted_calibration_goes_on_and_gives_the_same(model, tmp_path, size):
    work = calibration(model, Recipe(torch.float32, INT4, **METHODS["smooth, static"]))

    def first_layer(group):
        return next(calibrate(work, group, state_dir=tmp_path))

    run_ranks(size, first_layer)
    begun: list[int] = []
    whole = walk(work, size, state_dir=tmp_path, on_layer=begun.append)
    assert set(begun) == {1}, "layer 0 is not done again"
    assert_equal_layers(whole[0], walk(work)[0])
    begun.clear()
    assert_equal_layers(walk(work, size, state_dir=tmp_path, on_layer=begun.append)[0], whole[0])
    assert not begun
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 + size, names


def test_a_rank_that_was_cut_off_earlier_takes_the_others_back(model, tmp_path):
    """Rank 0 has written what enters layer 2, and not removed what enters layer 1; rank 1 has not."""
    work = calibration(model, Recipe(torch.float32, INT4))
    run_ranks(2, lambda group: next(calibrate(work, group, state_dir=tmp_path / "cut")))
    shutil.copytree(tmp_path / "cut", tmp_path / "whole")
    whole = walk(work, 2, state_dir=tmp_path / "whole")
    for name in ("layer_0001.safetensors", "hidden_0002_rank_0.safetensors"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "cut")
    begun: list[int] = []
    again = walk(work, 2, state_dir=tmp_path / "cut", on_layer=begun.append)
    assert set(begun) == {1}
    assert_equal_layers(again[1], whole[0])


def test_the_state_of_another_calibration_is_refused(model, tmp_path):
    walk(calibration(model, Recipe(torch.float32, INT4)), state_dir=tmp_path)
    with pytest.raises(CheckpointError, match="of another model, text, scheme"):
        walk(calibration(model, Recipe(torch.float32, INT8)), state_dir=tmp_path)


def test_the_state_of_another_number_of_ranks_is_refused_and_kept(model, tmp_path):
    """Rank 1 finds nothing of its own there, so that nothing would be gone on from, but replaced."""
    work = calibration(model, Recipe(torch.float32, INT4))
    walk(work, state_dir=tmp_path)
    names = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="scheme or number of ranks"):
        walk(work, 2, state_dir=tmp_path)
    assert sorted(tmp_path.iterdir()) == names


def test_a_damaged_state_is_refused(model, tmp_path):
    work = calibration(model, Recipe(torch.float32, INT4))
    walk(work, state_dir=tmp_path)
    path = tmp_path / "layer_0001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="calibrate again"):
        walk(work, state_dir=tmp_path)


def test_a_damaged_weight_is_refused_by_name(tmp_path):
    path = write_checkpoint(tmp_path)
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight must hold finite"):
        walk(calibration(path, Recipe(torch.float32, INT8)))


# Memory

MEMORY_SCRIPT = """
import sys, torch
import quant.methods.awq
from parallel.calibration.walk import Calibration, calibrate
from parallel.checkpoint.open import open_random
from parallel.group import LoneGroup
from quant.methods.ptq import Recipe
from quant.scheme import QuantScheme
from tests.checkpoints import CONFIG
from tests.memory import watch_memory
from tests.test_calibration import INT8, METHODS, token_ids
torch.set_num_threads(1)
quant.methods.awq.NUM_RATIOS = 2  # candidates come one after the other
BIG = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8,
       "num_key_value_heads": 8}
def run(shape):
    values = {**CONFIG, **shape, "num_hidden_layers": 2, "torch_dtype": "bfloat16"}
    checkpoint = open_random(values, QuantScheme(), 0)
    recipe = Recipe(torch.bfloat16, INT8, **METHODS[sys.argv[1]])
    work = Calibration(checkpoint.config, checkpoint.source, token_ids(64, 64), lambda _: recipe,
                       torch.bfloat16, 2)
    for layer in calibrate(work, LoneGroup(), num_threads=2):
        pass
run({})  # the block of random numbers, and what libraries keep for themselves
_, peak, after = watch_memory(lambda: run(BIG))
print(peak, after)
"""
LAYER_BYTES = 2 * (4 * 1024**2 + 3 * 1024 * 2816)


@pytest.mark.parametrize("method", ["rtn", "smooth", "awq", "gptq"])
def test_anonymous_memory_is_a_layer_and_a_half(method):
    """Random weights are anonymous, unlike those of a mapped file."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, method],
        # What is freed goes back at once, so that what is held is what is seen.
        env={**os.environ, "MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "262144"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[0])
    hessians = 2 * 4 * 2816**2 if method == "gptq" else 0
    # Activations of 128 tokens, and two threads' blocks of 256 rows as floats, six times over. Two
    # layers' worth of floats would still be seen.
    slack = 2 * 6 * 4 * 256 * 2816
    assert peak < 1.5 * LAYER_BYTES + hessians + slack, (peak, LAYER_BYTES)


def test_a_layer_is_let_go_before_the_next_is_done(model):
    """Its integers are half a layer."""
    gone: list[bool] = []
    made: list[weakref.ref[CalibratedLayer]] = []
    layers = calibrate(
        calibration(model, Recipe(torch.float32, INT8)),
        LoneGroup(),
        on_layer=lambda _: gone.extend(layer() is None for layer in made),
    )
    made.append(weakref.ref(next(layers)))
    next(layers)
    assert gone == [True]


def test_the_layers_of_a_lone_rank_are_all_there(model):
    layers = list(calibrate(calibration(model, Recipe(torch.float32, INT8)), LoneGroup()))
    assert [layer.index for layer in layers] == [0, 1]
    for layer in layers:
        assert all(isinstance(item, Rounded) for item in layer.rounded.values())
        assert tuple(layer.rounded) == PRODUCTS


def test_what_is_no_state_is_left_alone(model, tmp_path):
    stray = tmp_path / "hidden_x_rank_0.safetensors"
    stray.write_text("")
    walk(calibration(model, Recipe(torch.float32, INT4)), state_dir=tmp_path)
    assert stray.exists()


def test_state_that_lost_a_layer_names_what_to_remove(model, tmp_path):
    work = calibration(model, Recipe(torch.float32, INT4))
    walk(work, state_dir=tmp_path)
    (tmp_path / "layer_0000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"missing or none; remove {tmp_path} and calibrate"):
        walk(work, state_dir=tmp_path)
