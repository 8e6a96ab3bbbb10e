"""Static int8 activations: one scale for each input, from its file to the product, at every size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher.__main__ import main
from parallel.calibration.result import MODULES, CalibratedLayer
from parallel.calibration.walk import Calibration, calibrate
from parallel.checkpoint.open import Checkpoint, open_checkpoint, open_random
from parallel.checkpoint.readers.prepared import PreparedSource
from parallel.checkpoint.source import TensorInfo
from parallel.checkpoint.store import write_prepared
from parallel.errors import CheckpointError
from parallel.group import LoneGroup, ThreadGroup
from parallel.layers import RowParallelLinear
from quant.activations import most_int32_columns, quantize_static
from quant.errors import QuantError
from quant.kernels.choice import problem
from quant.kernels.native import NativeKernel, calls
from quant.kernels.onednn import OneDnnKernel
from quant.kernels.reference import ReferenceKernel
from quant.linear import linear
from quant.methods.layer import Product, input_scale
from quant.methods.ptq import Recipe
from quant.scheme import LinearScheme, QuantScheme
from quant.weight import QuantizedWeight, fuse
from tests.checkpoints import CONFIG, write_checkpoint
from tests.models import generate, load, logits
from tests.test_prepared import checksums, merged

SETS = list(calls.instruction_sets()) if calls.is_available() else []
KERNELS = [ReferenceKernel(), *(NativeKernel(name) for name in SETS)]
NAMES = ["reference", *SETS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The head has no calibrated input: its activations are scaled by row.
STATIC = QuantScheme(
    quant_method="rtn",
    weight_dtype="int8",
    activation_dtype="int8",
    act_quant_granularity="per_tensor",
    modules_to_not_convert=(),
    layer_policies=({"pattern": "lm_head", "act_quant_granularity": "per_token"},),
)
IDS = [1, *((37 * place) % 500 for place in range(1, 40))]
SAMPLES = [[(seed * 31 + 7 * place) % 2000 + 3 for place in range(24)] for seed in range(6)]


def make_weight(
    rows: int, columns: int, scale: float = 0.02, limit: int = 128, group_size: int | None = None
) -> QuantizedWeight:
    random = torch.Generator().manual_seed(rows)
    values = torch.randint(-limit, limit, (rows, columns), dtype=torch.int8, generator=random)
    num_groups = -(-columns // group_size) if group_size else 1
    return QuantizedWeight(
        values,
        torch.rand(rows, num_groups, generator=random) + 0.1,
        "int8",
        group_size=group_size,
        input_scale=torch.tensor([scale]),
    )


def make_rows(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Within the 2.54 of a scale of 0.02 for the most part, and beyond it: up to the largest."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    x[:, ::5] *= 10
    x[-1, 0], x[-1, columns // 2] = torch.finfo(dtype).max, torch.finfo(dtype).min
    return x.to(dtype)


def exact_product(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """The product by its definition in float64."""
    q = (x.double() / weight.input_scale.double()).round().clamp(-128, 127)
    scaled = weight.values_NK.double() * weight.scale_NG.double()
    return weight.input_scale.double() * (q @ scaled.T)


# One product


@pytest.mark.parametrize("scale", [0.02, 2**-6, 3.0])
@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_product_is_that_of_the_clamped_integers_in_float64(kernel, scale):
    weight, x, bias = make_weight(33, 129, scale), make_rows(13, 129), torch.randn(33)
    exact = exact_product(weight, x) + bias
    # The integer sums are exact; they are rounded to float32, multiplied twice, and added to.
    limit = 4 * 2**-24 * (exact.abs() + bias.abs())
    assert ((linear(x, kernel.pack(weight), bias) - exact).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_those_that_calibration_rounded_by(dtype):
    x, amax = make_rows(13, 129, dtype), torch.tensor([2.7])
    q, _ = quantize_static(x, input_scale(amax))
    calibrated = Product(torch.eye(129, dtype=dtype), static_amax=amax)(x)
    assert torch.equal((q * input_scale(amax)).to(dtype), calibrated)
    assert (q.min(), q.max()) == (-128, 127)


def make_ties(scale: Tensor) -> Tensor:
    """[3, 255]: the middles of two integers as float32 has them, and the numbers beside these."""
    middles = (torch.arange(-127, 128) + 0.5) * scale
    up, down = (torch.nextafter(middles, torch.tensor(to)) for to in (torch.inf, -torch.inf))
    return torch.stack([middles, up, down])


@pytest.mark.parametrize("amax", [0.1, 0.7, 1.3, 2.7, 11.0])
def test_ties_fall_as_calibration_rounded_them(amax):
    """Where a product with the reciprocal of the scale would give other integers."""
    scale = input_scale(torch.tensor([amax]))
    x = make_ties(scale)
    q, _ = quantize_static(x, scale)
    assert not torch.equal((x * (1 / scale)).round().clamp(-128, 127), q)
    calibrated = Product(torch.eye(255), static_amax=torch.tensor([amax]))(x)
    assert torch.equal(q * scale, calibrated)
    weight = replace(make_weight(70, 255), input_scale=scale)
    for kernel in KERNELS:
        assert_same_bits(kernel.pack(weight), ReferenceKernel().pack(weight), x, None)
    eye = QuantizedWeight(
        torch.eye(255, dtype=torch.int8), torch.ones(255, 1), "int8", input_scale=scale
    )
    for kernel in KERNELS:
        assert torch.equal(kernel.pack(eye).static_sums(x)[:-3].view(3, 255), q.int())


@pytest.mark.parametrize("columns", [1, 64, 129, 1026])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SETS)
def test_native_gives_the_bits_of_the_reference(name, dtype, columns):
    weight = make_weight(70, columns)
    exact, packed = ReferenceKernel().pack(weight), NativeKernel(name).pack(weight)
    bias = torch.randn(70).to(dtype)
    for rows in range(1, 14):
        assert_same_bits(packed, exact, make_rows(rows, columns, dtype), bias)


def test_native_reads_rows_that_lie_apart():
    weight, x = make_weight(70, 64), make_rows(5, 192)[:, 64:128]
    for name in SETS:
        assert_same_bits(NativeKernel(name).pack(weight), ReferenceKernel().pack(weight), x, None)


@pytest.mark.parametrize("rows", [1, 3, 13])
def test_onednn_gives_the_bits_of_the_reference(rows):
    """On every processor: weights within 63 cannot saturate, those within 127 need VNNI."""
    weight = make_weight(70, 1026, limit=128 if problem("onednn") is None else 63)
    packed = OneDnnKernel().pack(weight)
    assert_same_bits(packed, ReferenceKernel().pack(weight), make_rows(rows, 1026), None)


def assert_same_bits(packed, exact, x, bias):
    sums = exact.static_sums(x)
    assert sums.dtype == torch.int32
    assert torch.equal(packed.static_sums(x), sums)
    for out_dtype in (x.dtype, torch.float32):
        found, finished = (
            packed.linear(x, bias, out_dtype),
            packed.finish_static(sums, bias, out_dtype),
        )
        assert found.dtype == finished.dtype == out_dtype
        assert torch.equal(found, exact.linear(x, bias, out_dtype))
        assert torch.equal(finished, found)


@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_row_with_a_nan_or_an_infinity_gives_nan_and_spares_the_others(kernel, damage):
    x = make_rows(3, 65)
    x[1, 64] = damage
    for group_size in (None, 32):
        weight = make_weight(40, 65, group_size=group_size)
        kernel = ReferenceKernel() if group_size else kernel
        out = linear(x, kernel.pack(weight))
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


def test_largest_sums_do_not_wrap():
    columns = most_int32_columns()
    values = torch.full((32, columns), -128, dtype=torch.int8)
    weight = QuantizedWeight(values, torch.ones(32, 1), "int8", input_scale=torch.ones(1))
    x = torch.full((1, columns), -1e6)
    for kernel in KERNELS:
        assert (kernel.pack(weight).static_sums(x)[:-1] == 128 * 128 * columns).all()


def test_static_weight_says_so_and_counts_its_scale():
    weight = make_weight(32, 64)
    assert weight.scheme == LinearScheme("int8", None, "int8", "per_tensor")
    assert weight.nbytes == 32 * 64 + 32 * 4 + 4
    assert weight.columns(3, 9).input_scale is weight.input_scale


def test_fused_product_is_the_parts_side_by_side():
    parts, x = [make_weight(rows, 64) for rows in (32, 8, 8)], make_rows(3, 64)
    for kernel in KERNELS:
        alone = torch.cat([linear(x, kernel.pack(part)) for part in parts], dim=1)
        assert torch.equal(linear(x, kernel.pack(fuse(parts))), alone)
    with pytest.raises(AssertionError, match="one input, one scale"):
        fuse([*parts, make_weight(8, 64, scale=0.03)])


# A product of several ranks


@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_a_row_give_the_bits_of_the_whole_in_one_collective(size, kernel):
    weight, x, bias = make_weight(40, 128), make_rows(5, 128), torch.randn(40)
    x[2, 100] = torch.nan  # on the last rank alone

    def work(group):
        columns = slice(128 // size * group.rank, 128 // size * (group.rank + 1))
        part = kernel.pack(weight.columns(columns.start, columns.stop))
        return RowParallelLinear(part, bias, group)(x[:, columns]), group.counts["all_reduce"]

    alone = RowParallelLinear(kernel.pack(weight), bias, LoneGroup())(x)
    assert alone[2].isnan().all()
    for found, num_collectives in ThreadGroup.run(size, work):
        torch.testing.assert_close(found, alone, rtol=0, atol=0, equal_nan=True)
        assert num_collectives == 1


def test_grouped_parts_add_up_and_know_of_damage():
    """Their sums are floats: the order of the additions is that of the ranks."""
    weight, x = make_weight(40, 128, group_size=32), make_rows(5, 128).clamp(-9, 9)
    x[2, 100] = torch.nan

    def work(group):
        part = weight.columns(64 * group.rank, 64 * (group.rank + 1))
        part_x = x[:, 64 * group.rank : 64 * (group.rank + 1)]
        return RowParallelLinear(ReferenceKernel().pack(part), None, group)(part_x)

    alone = linear(x, weight)
    for found in ThreadGroup.run(2, work):
        # float32 sums of four groups.
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert found[2].isnan().all()


# A model


class CalibratedSource:
    """A checkpoint with what calibration made of its layers in place of their weights."""

    def __init__(self, checkpoint: Checkpoint, layers: Sequence[CalibratedLayer]) -> None:
        self._source = checkpoint.source
        self.path = self._source.path
        self._made = {
            f"model.layers.{layer.index}.{MODULES[name]}.{kind}": tensor
            for layer in layers
            for name, rounded in layer.rounded.items()
            for kind, tensor in (
                ("weight", rounded.values_NK),
                ("weight_scale", rounded.scale_NG),
                ("input_scale", layer.input_scales[name]),
            )
        }
        self.tensors = {
            **self._source.tensors,
            **{
                name: TensorInfo(tuple(made.shape), str(made.dtype).removeprefix("torch."), "")
                for name, made in self._made.items()
            },
        }

    def read(self, name, index):
        made = self._made.get(name)
        return self._source.read(name, index) if made is None else made[index]

    def identity(self):
        return self._source.identity()


def calibrated(path: Path, scheme: QuantScheme = STATIC) -> tuple[Checkpoint, CalibratedSource]:
    checkpoint = open_checkpoint(path)
    recipe = Recipe(getattr(torch, checkpoint.config.dtype), activations="per_tensor")
    work = Calibration(checkpoint.config, checkpoint.source, SAMPLES, lambda _: recipe)
    return checkpoint, CalibratedSource(checkpoint, list(calibrate(work, LoneGroup())))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def source(request, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source"), dtype=request.param)


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("prepared")
    checkpoint, made = calibrated(source)
    for size in (1, 2, 4):
        write_prepared(checkpoint.layout(STATIC), made, size, folder / f"tp{size}")
    return {size: folder / f"tp{size}" for size in (1, 2, 4)}


@pytest.mark.parametrize("kernel", [KERNELS[0], KERNELS[-1]], ids=[NAMES[0], NAMES[-1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_logits_have_the_same_bits_at_every_size(prepared, size, dtype, kernel):
    how = {"dtype": dtype, "kernel": kernel}
    alone = logits(prepared[1], IDS, 1, dtype=dtype)
    assert alone.isfinite().all()
    assert torch.equal(logits(prepared[size], IDS, size, **how), alone)
    assert torch.equal(logits(prepared[1], IDS, size, **how), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_text_is_the_same_at_every_size(prepared, dtype):
    prompts, how = [[1, 5, 9], [1, 700]], {"dtype": dtype, "kernel": KERNELS[-1]}
    alone = generate(prepared[1], prompts, 1, **how)
    for size in (2, 4):
        assert generate(prepared[size], prompts, size, **how) == alone


def test_logits_are_near_those_of_the_model(source, prepared):
    found, wanted = (logits(path, SAMPLES[0], 1) for path in (prepared[1], source))
    # Samples that calibration saw: 127 steps of the largest input in every product. 0.04 was seen.
    assert 1e-4 < (found - wanted).norm() / wanted.norm() < 0.08


def test_logits_equal_those_of_the_static_model_in_float64(source, prepared):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    tensors = merged(prepared[1])
    for path, module in model.named_modules():
        if f"{path}.weight_scale" in tensors:
            values, scale = tensors[f"{path}.weight"], tensors[f"{path}.weight_scale"]
            module.weight.data = values.double() * scale.double()
            module.register_forward_pre_hook(input_rounding(tensors.get(f"{path}.input_scale")))
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0, :-1]
    for size in (1, 4):
        found = logits(prepared[size], IDS, size).double()
        # 1e-7 was seen; room for an activation that float32 tips into the next of 127 steps. That
        # of dynamic activations is 0.05 away.
        assert (found - expected).norm() <= 1e-3 * expected.norm()


def input_rounding(scale: Tensor | None) -> Callable[..., tuple[Tensor]]:
    """A hook that rounds the input of a linear: with a scale, or by row."""

    def rounded(_module, args):
        (x,) = args
        step = x.abs().amax(-1, keepdim=True) / 127 if scale is None else scale.double()
        return ((x / step).round().clamp(-128, 127) * step,)

    return rounded


def test_a_step_has_one_collective_less_for_each_row_parallel_product(prepared, source):
    def counted(path, scheme):
        def work(group):
            decoder = load(open_checkpoint(path), group, scheme)
            before = group.counts["all_reduce"]
            decoder.new_cache(1, 8)
            x = torch.randn(1, 64)
            decoder.layers[0].mlp.down_proj(x[:, :56])
            return group.counts["all_reduce"] - before

        return ThreadGroup.run(2, work)

    dynamic = replace(STATIC, act_quant_granularity="per_token", layer_policies=())
    assert counted(prepared[2], QuantScheme()) == [1, 1]
    assert counted(source, dynamic) == [2, 2]


def test_every_rank_has_every_scale_whole(prepared):
    name = "model.layers.1.self_attn.o_proj.input_scale"
    expected = merged(prepared[1])[name]
    assert expected.dtype == torch.float32
    assert expected.shape == (1,)
    for rank in range(4):
        assert torch.equal(
            load_file(prepared[4] / f"rank_{rank}/model.safetensors")[name], expected
        )
    tensors = merged(prepared[1])
    assert sum(name.endswith(".input_scale") for name in tensors) == 14
    assert "lm_head.input_scale" not in tensors


@pytest.mark.parametrize(("size", "other"), [(2, 4), (4, 1), (1, 2)])
def test_resharding_gives_the_bytes_of_preparing_the_source(prepared, tmp_path, size, other):
    checkpoint = open_checkpoint(prepared[size])
    layout = checkpoint.layout(STATIC)
    write_prepared(layout, checkpoint.source, other, tmp_path / "again")
    assert checksums(tmp_path / "again") == checksums(prepared[other])


def test_plan_counts_the_bytes_of_every_shard(prepared):
    layout = open_checkpoint(prepared[4]).layout(QuantScheme())
    for rank in range(4):
        tensors = load_file(prepared[4] / f"rank_{rank}/model.safetensors").values()
        assert sum(tensor.nbytes for tensor in tensors) == layout.rank_bytes(rank, 4)


def test_weights_in_memory_have_the_scale_of_the_file(prepared):
    decoder = load(open_checkpoint(prepared[1]), LoneGroup())
    tensors = merged(prepared[1])
    attention = decoder.layers[1].self_attn
    for product, name in ((attention.qkv_proj.linear, "k_proj"), (attention.o_proj, "o_proj")):
        found = product.local_weight.input_scale
        assert torch.equal(found, tensors[f"model.layers.1.self_attn.{name}.input_scale"])
    assert decoder.lm_head.local_weight.input_scale is None


# What is refused


def test_static_scales_of_an_unquantized_checkpoint_need_calibration(tmp_path):
    path = write_checkpoint(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"layers.0.*_proj.input_scale.*calibration"):
        load(open_checkpoint(path), LoneGroup(), STATIC)


@pytest.mark.parametrize("task", ["generate", "bench"])
def test_command_refuses_in_a_sentence(tmp_path, capsys, task):
    path = write_checkpoint(tmp_path / "source")
    words = (f"checkpoint={path}", "quant=rtn_a8w8", "quant.act_quant_granularity=per_tensor")
    assert main([task, *words]) == 2
    error = capsys.readouterr().err
    assert "needs calibration" in error
    assert "shardrun prepare" in error
    assert "Traceback" not in error


def changed(path: Path, to: Path, name: str, value: Tensor) -> Path:
    """A copy with another tensor in it."""
    shutil.copytree(path, to)
    file = to / "rank_0/model.safetensors"
    tensors = load_file(file)
    tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt", "rank": "0", "tp": "1"})
    return to


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_scale_that_is_none_is_refused(prepared, tmp_path, value):
    name = "model.layers.1.mlp.down_proj.input_scale"
    path = changed(prepared[1], tmp_path / "out", name, torch.tensor([value]))
    with pytest.raises(CheckpointError, match=f"{name} must be a finite number above zero"):
        load(open_checkpoint(path), LoneGroup())


def test_parts_of_one_product_with_other_scales_are_refused(prepared, tmp_path):
    name = "model.layers.0.self_attn.k_proj.input_scale"
    path = changed(prepared[1], tmp_path / "out", name, torch.tensor([0.5]))
    with pytest.raises(CheckpointError, match=rf"{name}.* must be equal.*0\.5"):
        load(open_checkpoint(path), LoneGroup())


def test_manifest_of_a_static_scheme_without_scales_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "source")
    dynamic = replace(STATIC, act_quant_granularity="per_token", layer_policies=())
    checkpoint = open_checkpoint(path)
    write_prepared(checkpoint.layout(dynamic), checkpoint.source, 1, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    manifest["scheme"]["act_quant_granularity"] = "per_tensor"
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="needs calibration"):
        open_checkpoint(tmp_path / "out").layout(QuantScheme())


def test_preparing_without_calibration_leaves_nothing_behind(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "source"))
    with pytest.raises(CheckpointError, match="needs calibration"):
        write_prepared(checkpoint.layout(STATIC), checkpoint.source, 2, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_q_and_k_of_other_granularities_are_told_apart():
    policy = {"pattern": "q_proj", "act_quant_granularity": "per_token"}
    scheme = replace(STATIC, layer_policies=(policy, *STATIC.layer_policies))
    with pytest.raises(QuantError, match="q_proj w8a8, k_proj w8a8 static"):
        open_random(CONFIG, scheme, seed=0)


def test_static_prepared_directory_is_named_so(prepared):
    assert PreparedSource(prepared[1]).scheme.label == "w8a8 static mixed"
