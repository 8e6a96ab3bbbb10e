"""Asymmetric static activations: a zero point, from its file to the product, at every size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from parallel.checkpoint.open import describe_layout, open_checkpoint
from parallel.checkpoint.readers.huggingface import INDEX_NAME
from parallel.checkpoint.store import write_prepared
from parallel.errors import CheckpointError
from parallel.group import LoneGroup, ThreadGroup
from parallel.layers import RowParallelLinear
from quant.activations import most_int32_columns, quantize_static
from quant.kernels.choice import is_exact, problem
from quant.kernels.native import NativeKernel
from quant.kernels.onednn import OneDnnKernel
from quant.kernels.reference import ReferenceKernel
from quant.linear import linear
from quant.scheme import QuantScheme
from quant.weight import QuantizedWeight, fuse
from tests.checkpoints import write_checkpoint
from tests.models import generate, load, logits
from tests.test_captured import programs, texts
from tests.test_compressed import Q, damage_config, damage_tensors, load_judge
from tests.test_compressed import transformers as transformers
from tests.test_export import export, is_equal, read_all
from tests.test_prepared import checksums, merged, prepare
from tests.test_static_activations import (
    DTYPES,
    IDS,
    KERNELS,
    NAMES,
    SETS,
    STATIC,
    assert_same_bits,
    calibrated,
    make_rows,
    make_weight,
)

POINTS = [-128, -3, 127]


def make_asymmetric(rows: int, columns: int, zero_point: int, **how) -> QuantizedWeight:
    return replace(make_weight(rows, columns, **how), input_zero_point=zero_point)


def exact_product(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """As Golden Stick's operators compute it, in float64: with what makes up for the zero point."""
    scale, zero_point = weight.input_scale.double(), weight.input_zero_point
    q = ((x.double() / scale).round() + zero_point).clamp(-128, 127)
    values = weight.values_NK.double()
    return scale * (q @ values.T - zero_point * values.sum(dim=1)) * weight.scale_NG.double().T


# One product


@pytest.mark.parametrize("zero_point", POINTS)
@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_product_is_that_of_the_shifted_integers_in_float64(kernel, zero_point):
    weight, x = make_asymmetric(33, 129, zero_point), make_rows(13, 129)
    bias = torch.randn(33)
    exact = exact_product(weight, x) + bias
    # The integer sums are exact; they are rounded to float32, multiplied twice, and added to.
    limit = 4 * 2**-24 * (exact.abs() + bias.abs())
    assert ((linear(x, kernel.pack(weight), bias) - exact).abs() <= limit).all()


@pytest.mark.parametrize("zero_point", [*POINTS, 0])
def test_range_is_moved_and_zero_stays_zero(zero_point):
    x = torch.tensor([[-1e30, 0.0, -0.4, 1e30]])
    q, _ = quantize_static(x, torch.ones(1), zero_point)
    assert q.tolist() == [[-128 - zero_point, 0, 0, 127 - zero_point]]


@pytest.mark.parametrize("columns", [1, 129, 1026])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SETS)
def test_native_gives_the_bits_of_the_reference(name, dtype, columns):
    bias = torch.randn(70).to(dtype)
    for zero_point in POINTS:
        weight = make_asymmetric(70, columns, zero_point)
        exact, packed = ReferenceKernel().pack(weight), NativeKernel(name).pack(weight)
        for rows in (1, 5):
            assert_same_bits(packed, exact, make_rows(rows, columns, dtype), bias)


@pytest.mark.parametrize("zero_point", POINTS)
def test_onednn_gives_the_bits_of_the_reference(zero_point):
    """On every processor: weights within 63 cannot saturate, those within 127 need VNNI."""
    limit = 128 if problem("onednn") is None else 63
    weight = make_asymmetric(70, 1026, zero_point, limit=limit)
    packed = OneDnnKernel().pack(weight)
    assert_same_bits(packed, ReferenceKernel().pack(weight), make_rows(3, 1026), None)


@pytest.mark.parametrize("name", SETS)
def test_groups_have_the_bits_of_the_reference(name):
    for zero_point in POINTS:
        weight = make_asymmetric(40, 160, zero_point, group_size=64)
        exact, packed = ReferenceKernel().pack(weight), NativeKernel(name).pack(weight)
        x = make_rows(3, 160)
        assert torch.equal(packed.static_sums(x), exact.static_sums(x))
        assert torch.equal(linear(x, packed), linear(x, exact))
        wide = (
            weight.dequantize(torch.float64),
            quantize_static(x, weight.input_scale, zero_point),
        )
        found, q = exact.static_sums(x)[:-3].view(3, 40), wide[1][0].double()
        # Three groups, each rounded to float32, scaled and added.
        limit = 5 * 2**-24 * (q.abs() @ wide[0].abs().T)
        assert ((found - q @ wide[0].T).abs() <= limit).all()


@pytest.mark.parametrize("zero_point", [-128, 127])
@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_largest_sums_do_not_wrap(kernel, zero_point):
    columns, most = most_int32_columns(zero_point), 128 + abs(zero_point)
    values = torch.full((32, columns), -128, dtype=torch.int8)
    sign = 1 if zero_point < 0 else -1
    weight = QuantizedWeight(
        values, torch.ones(32, 1), "int8", input_scale=torch.ones(1), input_zero_point=zero_point
    )
    found = kernel.pack(weight).static_sums(torch.full((1, columns), sign * 1e6))[:-1]
    assert (found == -sign * 128 * (most - (zero_point < 0)) * columns).all()
    assert most * 128 * columns < 2**31 <= most * 128 * (columns + 1)


class Forgetful(ReferenceKernel):
    """Right but for the zero point."""

    def pack(self, weight):
        return super().pack(replace(weight, input_zero_point=0))


def test_kernel_that_forgets_the_zero_point_is_not_exact():
    assert not is_exact(Forgetful())
    assert is_exact(ReferenceKernel())


def test_fused_product_has_one_zero_point():
    parts, x = [make_asymmetric(rows, 64, -3) for rows in (32, 8, 8)], make_rows(3, 64)
    for kernel in KERNELS:
        alone = torch.cat([linear(x, kernel.pack(part)) for part in parts], dim=1)
        assert torch.equal(linear(x, kernel.pack(fuse(parts))), alone)
    with pytest.raises(AssertionError, match="one input, one zero point"):
        fuse([*parts, make_asymmetric(8, 64, 3)])


# A product of several ranks


@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
@pytest.mark.parametrize(("size", "zero_point"), [(2, -128), (4, 127)])
def test_parts_of_a_row_give_the_bits_of_the_whole(size, kernel, zero_point):
    weight, x, bias = make_asymmetric(40, 128, zero_point), make_rows(5, 128), torch.randn(40)
    x[2, 100] = torch.nan  # on the last rank alone

    def work(group):
        columns = slice(128 // size * group.rank, 128 // size * (group.rank + 1))
        part = kernel.pack(weight.columns(columns.start, columns.stop))
        return RowParallelLinear(part, bias, group)(x[:, columns])

    alone = RowParallelLinear(kernel.pack(weight), bias, LoneGroup())(x)
    for found in ThreadGroup.run(size, work):
        torch.testing.assert_close(found, alone, rtol=0, atol=0, equal_nan=True)


# A model: its static scales are calibrated, and get zero points in the form of compressed-tensors

ZEROS = {"qkv": -19, "o": 41, "gate_up": 127, "down": -128}
INPUTS = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o",
    "gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down",
}  # fmt: skip


def add_zero_points(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(".input_scale")]:
        zero_point = ZEROS[INPUTS[name.split(".")[-2]]]
        tensors[name.replace("input_scale", "input_zero_point")] = torch.tensor(
            [zero_point], dtype=torch.int8
        )


def make_config_asymmetric(config: dict) -> None:
    for group in config["config_groups"].values():
        if group["input_activations"]["strategy"] == "tensor":
            group["input_activations"]["symmetric"] = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("asymmetric")


@pytest.fixture(scope="module")
def compressed(folder) -> Path:
    """As llm-compressor writes a W8A8 of asymmetric static activations."""
    source = write_checkpoint(folder / "source", hidden_size=128, intermediate_size=256)
    checkpoint, made = calibrated(source)
    write_prepared(checkpoint.layout(STATIC), made, 1, folder / "symmetric")
    path = export(folder / "symmetric", folder / "compressed")
    damage_tensors(path, add_zero_points)
    damage_config(path, make_config_asymmetric)
    return path


@pytest.fixture(scope="module")
def prepared(compressed, folder) -> dict[int, Path]:
    return {
        size: prepare(compressed, folder / f"tp{size}", size, QuantScheme()) for size in (1, 2, 4)
    }


@pytest.mark.parametrize(("size", "kernel"), [(2, KERNELS[0]), (4, KERNELS[-1])], ids=["2", "4"])
def test_logits_have_the_same_bits_at_every_size(compressed, prepared, size, kernel):
    alone = logits(prepared[1], IDS, 1)
    assert alone.isfinite().all()
    assert torch.equal(logits(prepared[size], IDS, size, kernel=kernel), alone)
    assert torch.equal(logits(compressed, IDS, size, kernel=kernel), alone)


def test_text_is_the_same_at_every_size_and_by_every_kernel(prepared):
    prompts, how = [[1, 5, 9], [1, 700]], {"dtype": torch.bfloat16, "new_tokens": 5}
    alone = generate(prepared[1], prompts, 1, kernel=ReferenceKernel(), **how)
    for size in (1, 4):
        assert generate(prepared[size], prompts, size, kernel=KERNELS[-1], **how) == alone


@pytest.mark.skipif(not SETS, reason="no C compiler at installation")
def test_decode_steps_are_captured(prepared):
    how = {"dtype": torch.bfloat16, "kernel": NativeKernel()}
    model = load(open_checkpoint(prepared[1]), LoneGroup(), **how)
    texts(model)
    assert len(programs(model)) == 3


def rounding_input(scale: Tensor | None, zero_point: Tensor | None) -> Callable[..., tuple[Tensor]]:
    """A hook that rounds the input of a linear: with a scale and a zero point, or by row."""

    def rounded(_module, args):
        (x,) = args
        if scale is None:
            step = x.abs().amax(-1, keepdim=True) / 127
            return ((x / step).round() * step,)
        q = ((x / scale.double()).round() + zero_point.double()).clamp(-128, 127)
        return ((q - zero_point.double()) * scale.double(),)

    return rounded


def round_inputs(model, tensors: dict[str, Tensor]) -> None:
    """Give a float64 model of transformers quantized tensors of ours, and round their inputs."""
    for path, module in model.named_modules():
        if f"{path}.weight_scale" in tensors:
            values, scale = tensors[f"{path}.weight"], tensors[f"{path}.weight_scale"]
            module.weight.data = values.double() * scale.double()
            said = [tensors.get(f"{path}.input_{kind}") for kind in ("scale", "zero_point")]
            module.register_forward_pre_hook(rounding_input(*said))


def test_logits_equal_those_of_the_asymmetric_model_in_float64(folder, prepared):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "source", dtype=torch.float64
    )
    symmetric = logits(folder / "symmetric", IDS, 1).double()
    round_inputs(model, merged(prepared[1]))
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0, :-1]
    for size in (1, 4):
        found = logits(prepared[size], IDS, size).double()
        # Room for an activation that float32 tips into the next integer.
        assert (found - expected).norm() <= 1e-3 * expected.norm()
    assert (symmetric - expected).norm() > 0.1 * expected.norm()


def test_every_rank_has_every_zero_point_and_the_plan_counts_it(prepared, compressed):
    expected = merged(prepared[1])
    assert sum(name.endswith(".input_zero_point") for name in expected) == 14
    layout = open_checkpoint(prepared[4]).layout(QuantScheme())
    for rank in range(4):
        tensors = load_file(prepared[4] / f"rank_{rank}/model.safetensors")
        name = "model.layers.1.mlp.down_proj.input_zero_point"
        assert torch.equal(tensors[name], expected[name])
        assert tensors[name].item() == -128
        assert sum(tensor.nbytes for tensor in tensors.values()) == layout.rank_bytes(rank, 4)
    planned = describe_layout(compressed, QuantScheme(), {}, vocab_emb_dp=False)
    assert planned.rank_bytes(0, 4) == layout.rank_bytes(0, 4)


def test_resharding_gives_the_bytes_of_preparing_the_source(prepared, tmp_path):
    for size, other in ((2, 4), (4, 1)):
        found = prepare(prepared[size], tmp_path / f"again{other}", other, QuantScheme())
        assert checksums(found) == checksums(prepared[other])


def test_an_export_is_what_it_was_prepared_from(compressed, prepared, tmp_path):
    found = export(prepared[4], tmp_path / "again")
    assert is_equal(read_all(found), read_all(compressed))
    assert json.loads((found / "config.json").read_text()) == json.loads(
        (compressed / "config.json").read_text()
    )


def test_symmetric_directories_hold_no_zero_point(folder):
    assert not any("zero_point" in name for name in merged(folder / "symmetric"))


def test_an_index_must_list_the_zero_points(compressed, tmp_path):
    path = shutil.copytree(compressed, tmp_path / "indexed")
    names = [name for name in read_all(path) if name != f"{Q}.input_zero_point"]
    weight_map = dict.fromkeys(names, "shard.safetensors")
    (path / "model.safetensors").rename(path / "shard.safetensors")
    (path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors .*{Q}.input_zero_point"):
        describe_layout(path, QuantScheme(), {}, vocab_emb_dp=False)


DAMAGED = {
    "missing": (lambda t: t.pop(f"{Q}.input_zero_point"), f"lacks {Q}.input_zero_point"),
    "of nine bits": (
        lambda t: t.update({f"{Q}.input_zero_point": torch.tensor([128], dtype=torch.int32)}),
        f"{Q}.input_zero_point must be an integer of 8 bits .*but is 128"),
    "float": (
        lambda t: t.update({f"{Q}.input_zero_point": torch.zeros(1)}), "must be int8 or .*float32"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGED)
def test_damaged_zero_points_are_refused_when_it_is_opened(fault, compressed, tmp_path):
    edit, says = DAMAGED[fault]
    path = shutil.copytree(compressed, tmp_path / "damaged")
    damage_tensors(path, edit)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(path).layout(QuantScheme())


def test_zero_point_that_is_a_scalar_of_more_bits_is_read(compressed, prepared, tmp_path):
    path = shutil.copytree(compressed, tmp_path / "scalar")
    name = f"{Q}.input_zero_point"
    damage_tensors(path, lambda t: t.update({name: t[name].long().view(())}))
    found = prepare(path, tmp_path / "again", 1, QuantScheme())
    assert is_equal(merged(found), merged(prepared[1]))


def test_parts_of_one_product_with_other_zero_points_are_refused(compressed, tmp_path):
    path = shutil.copytree(compressed, tmp_path / "damaged")
    name = Q.replace("q_proj", "v_proj") + ".input_zero_point"
    damage_tensors(path, lambda t: t.update({name: torch.tensor([7], dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"{name} must be equal, as they are zero .*-19, 7"):
        load(open_checkpoint(path), LoneGroup())


def test_transformers_loads_an_export_and_says_the_same(transformers, prepared, tmp_path):
    model = load_judge(transformers, export(prepared[2], tmp_path / "hf"))
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0, :-1]
    found = logits(prepared[2], IDS, 2)
    # It rounds x / scale + zero point in one; ties, and lm_head's range by row, are cut otherwise.
    assert (found - expected).norm() <= 0.02 * expected.norm()
