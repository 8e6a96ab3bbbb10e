"""Models over an int8 KV cache: from the configuration to text, on every number of ranks."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from launcher.__main__ import main
from launcher.config import compose
from launcher.resolve import DEMO
from launcher.tasks.bench.work import Case, decode_work
from launcher.text import open_tokenizer
from parallel.checkpoint.layout_checks import check_calibrated
from parallel.checkpoint.memory import Memory
from parallel.checkpoint.open import open_checkpoint, open_random
from parallel.checkpoint.plan import Workload, plan_rank
from parallel.checkpoint.readers.prepared import PreparedSource
from parallel.errors import CheckpointError
from parallel.generation.perplexity import cut_windows, window_loss
from parallel.group import LoneGroup
from parallel.model import captured
from parallel.model.placements import KV_SCALES
from quant.errors import QuantError
from quant.kernels.native.calls import is_available
from quant.scheme import QuantScheme
from tests.checkpoints import CONFIG, random_weights, write_checkpoint, write_weights
from tests.models import generate, load, logits, run_ranks
from tests.test_captured import MODEL, decoder, programs, texts
from tests.test_prepared import checksums, prepare

C8 = QuantScheme(quant_method="rtn", kvcache_dtype="int8")
SCHEMES = {
    "c8": C8,
    "c8 static": replace(C8, kvcache_quant_granularity="per_channel"),
    "w8a16 c8": replace(C8, weight_dtype="int8"),
    "w8a8 c8": replace(C8, weight_dtype="int8", activation_dtype="int8"),
    "w4a16 g32 c8": replace(
        C8, weight_dtype="int4", weight_quant_granularity="per_group", group_size=32
    ),
    "w8a16 c8 static": replace(C8, weight_dtype="int8", kvcache_quant_granularity="per_channel"),
}
SIZES = (1, 2, 4)
IDS = [1, *range(300, 380)]
STATIC = SCHEMES["c8 static"]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A checkpoint that brings static scales, each of its own size."""
    path = write_checkpoint(tmp_path_factory.mktemp("calibrated"))
    write_weights(path, with_scales(random_weights(CONFIG, torch.float32, 0)))
    return path


def with_scales(weights):
    random = torch.Generator().manual_seed(1)
    for layer in range(2):
        for name in KV_SCALES:
            # Keys and values are of size one; these saturate some of them.
            scale = 0.02 + 0.01 * torch.rand(32, generator=random)
            weights[f"model.layers.{layer}.{name}"] = scale
    return weights


def source_of(name, request):
    return request.getfixturevalue("calibrated") if "static" in name else DEMO


@pytest.mark.parametrize("name", SCHEMES)
def test_scheme_is_called_by_weights_activations_and_cache(name):
    scheme = SCHEMES[name]
    assert scheme.label == name
    assert QuantScheme.from_dict(scheme.to_dict()) == scheme


def test_label_of_policies_names_the_cache_too():
    policy = {"pattern": "down_proj", "weight_dtype": "int8"}
    assert replace(C8, layer_policies=(policy,)).label == "mixed c8"


def test_preset_is_golden_sticks():
    assert compose(["quant=rtn_c8"]).quant.scheme() == C8


@pytest.mark.parametrize("name", SCHEMES)
def test_text_depends_on_no_rank_count_chunk_or_neighbour(name, request):
    """In float32; at 4 ranks the calibrated model's two kv heads are replicated."""
    path, scheme = source_of(name, request), SCHEMES[name]
    tokenizer = open_tokenizer(path)
    prompts = [tokenizer.encode(text) for text in ("I love Beijing, because", "LLaMA is a", "The")]
    expected = generate(path, prompts, 1, scheme=scheme)
    for how in ({"chunk": 3}, {"rows": 1}):
        assert generate(path, prompts, 1, scheme=scheme, **how) == expected
    for size in SIZES[1:]:
        assert generate(path, prompts, size, scheme=scheme, chunk=4) == expected


@pytest.mark.parametrize("name", ["c8", "c8 static", "w8a16 c8"])
def test_decode_and_chunks_equal_one_prefill(name, request):
    path, scheme = source_of(name, request), SCHEMES[name]
    whole = logits(path, IDS, 2, scheme=scheme)
    for chunk in (7, 1):
        # float32: sums in another order. A last bit may tip a key into the next of 127 steps.
        found = logits(path, IDS, 2, scheme=scheme, chunk=chunk)
        assert (found - whole).norm() <= 1e-4 * whole.norm()
    unquantized = logits(DEMO, IDS, 2)
    if path == DEMO:
        assert (whole - unquantized).norm() > 1e-4 * whole.norm()


@pytest.mark.parametrize("name", ["c8", "c8 static"])
def test_logits_are_those_of_a_float64_model_whose_cache_rounds(name, request):
    """transformers, whose cache is given what the integers stand for, by the formula."""
    transformers = pytest.importorskip("transformers")
    path = source_of(name, request)
    scales = {
        key: value.double() for key, value in load_file(path / "model.safetensors").items()
        if key.endswith(KV_SCALES)
    }  # fmt: skip

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        plain = model(torch.tensor([IDS])).logits[0, :-1]
        with rounding_caches(scales):
            expected = model(torch.tensor([IDS])).logits[0, :-1]
    found = logits(path, IDS, 1, scheme=SCHEMES[name]).double()
    # What float32 tips into another step, beside what the integers change: 1e-4 of it was seen.
    assert (found - expected).norm() <= 1e-2 * (plain - expected).norm()


@contextmanager
def rounding_caches(scales):
    """The caches that transformers' models make keep what the integers stand for, by the formula.

    Args:
        scales: float64, by their names in a checkpoint; without one a token's head has its own.
    """
    from transformers import DynamicCache

    update = DynamicCache.update

    def rounding_update(cache, keys, values, layer, *rest, **named):
        kept = (
            rounded(x, scales.get(f"model.layers.{layer}.{part}"))
            for x, part in zip((keys, values), KV_SCALES, strict=True)
        )
        return update(cache, *kept, layer, *rest, **named)

    with mock.patch.object(DynamicCache, "update", rounding_update):
        yield


def rounded(x, scale_C):
    """x [1, H, T, C] in steps of 1/127 of each row's largest, or of the given scales."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    if scale_C is not None:
        scale = scale_C.view(x.shape[1], 1, x.shape[3])
    return torch.clamp(torch.round(x / scale), -127, 127) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_perplexity_of_the_demo_is_within_half_a_percent(dtype):
    ids = open_tokenizer(DEMO).encode((DEMO / "held_out.txt").read_text())[:4096]
    loss = {}
    for scheme in (QuantScheme(), C8):
        model = load(open_checkpoint(DEMO), LoneGroup(), scheme, dtype, length=512)
        cache = model.new_cache(1, 512)
        found = [
            window_loss(model, cache, ids, window, 512)
            for window in cut_windows(len(ids), 512, 512)
        ]
        loss[scheme.label] = sum(item.nll_sum for item in found) / sum(
            item.num_tokens for item in found
        )
    assert loss["c8"] != loss["none"]
    assert abs(loss["c8"] - loss["none"]) < 0.005


@pytest.mark.skipif(not is_available(), reason="no C compiler at installation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["w8a16 c8", "w8a8 c8", "w8a16 c8 static"])
def test_captured_steps_give_the_text_of_plain_ones(name, dtype, monkeypatch):
    model = decoder(LoneGroup(), SCHEMES[name], dtype)
    found = texts(model)
    assert len(programs(model)) == 3
    assert texts(model) == found  # with another cache
    monkeypatch.setattr(captured, "is_available", lambda: False)
    plain = decoder(LoneGroup(), SCHEMES[name], dtype)
    assert texts(plain) == found
    assert not plain._captured


@pytest.mark.parametrize("name", ["c8", "w8a16 c8 static"])
def test_prepared_checkpoint_carries_the_cache_and_its_scales(name, request, tmp_path):
    source, scheme = source_of(name, request), SCHEMES[name]
    expected = generate(source, [IDS[:9]], 1, scheme=scheme)
    paths = {size: prepare(source, tmp_path / f"tp{size}", size, scheme) for size in SIZES}
    for size, path in paths.items():
        assert PreparedSource(path).scheme == scheme
        assert generate(path, [IDS[:9]], 4 // size) == expected
    again = prepare(paths[4], tmp_path / "again", 2, scheme)
    assert checksums(again) == checksums(paths[2])


def test_each_rank_holds_the_scales_of_its_kv_heads(calibrated):
    """Two heads on four ranks: each is on two of them."""
    stored = load_file(calibrated / "model.safetensors")

    def work(group):
        return load(open_checkpoint(calibrated), group, STATIC, torch.bfloat16).kv_scales

    for size in SIZES:
        for rank, layers in enumerate(run_ranks(size, work)):
            for layer, scales in enumerate(layers):
                for name, scale in zip(KV_SCALES, scales, strict=True):
                    heads = stored[f"model.layers.{layer}.{name}"].view(2, 16)
                    first = rank * 2 // size
                    assert torch.equal(scale, heads[first : first + max(1, 2 // size)])


def test_static_scales_need_calibration():
    checkpoint = open_checkpoint(DEMO)
    layout = checkpoint.layout(STATIC)
    with pytest.raises(CheckpointError, match=r"no .*k_scale, .* needs calibration"):
        check_calibrated(layout, checkpoint.source.tensors, "demo")


@pytest.mark.parametrize("bad", [0.0, -0.1, torch.nan, torch.inf])
def test_scale_that_is_none_is_refused(bad, tmp_path):
    path = write_checkpoint(tmp_path / "source")
    weights = with_scales(random_weights(CONFIG, torch.float32, 0))
    weights["model.layers.1.self_attn.v_scale"][3] = bad
    write_weights(path, weights)
    with pytest.raises(CheckpointError, match=r"layers\.1.*v_scale must hold positive finite"):
        load(open_checkpoint(path), LoneGroup(), STATIC)


def test_scales_that_nobody_asked_for_are_not_ignored(calibrated):
    with pytest.raises(CheckpointError, match=r"does not know, first .*k_scale"):
        open_checkpoint(calibrated).layout(C8)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kvcache_dtype": "int4"}, "must be one of null, int8, but is 'int4'"),
        ({"kvcache_dtype": "int-8"}, r"did you mean int8\?"),
        ({"quant_method": None}, "quant_method` must be rtn"),
        ({"kvcache_quant_granularity": "per_head"}, "must be one of per_channel, per_token"),
        (
            {"kvcache_dtype": None, "weight_dtype": "int8",
             "kvcache_quant_granularity": "per_channel"},
            "no effect while quant.kvcache_dtype is null",
        ),
        ({"activation_dtype": "int8"}, "no effect while quant.weight_dtype is null"),
        ({"modules_to_not_convert": ("down_proj",)}, "no effect where no weight is quantized"),
        (
            {"layer_policies": ({"pattern": "down_proj", "weight_dtype": None},)},
            "no effect where no weight is quantized",
        ),
        (
            {"weight_dtype": "int8",
             "layer_policies": ({"pattern": "o_proj", "kvcache_dtype": None},)},
            "no key of a policy",
        ),
    ],
)  # fmt: skip
def test_malformed_cache_is_refused_with_the_reason(fields, says):
    values = {"quant_method": "rtn", "kvcache_dtype": "int8", **fields}
    with pytest.raises(QuantError, match=says):
        QuantScheme.from_dict(values)


@pytest.mark.parametrize("name", ["c8", "w8a16 c8 static"])
@pytest.mark.parametrize("size", SIZES)
def test_plan_counts_the_bytes_of_the_cache(name, size):
    """Also where kv heads are replicated."""
    checkpoint = open_random({**MODEL, "num_hidden_layers": 2}, SCHEMES[name], seed=0)
    layout = checkpoint.layout(SCHEMES[name])

    def held(group):
        model = load(checkpoint, group, SCHEMES[name], torch.bfloat16)
        return model.new_cache(3, 50).nbytes, sum(
            x.nbytes for pair in model.kv_scales for x in pair
        )

    planned = plan_rank(layout, size, Workload(3, 50, 16, "bfloat16")).kv_cache_bytes
    scales = [part for part in layout.tensors if part.name.endswith(KV_SCALES)]
    for rank, found in enumerate(run_ranks(size, held)):
        in_weights = sum(part.num_bytes(rank, size, "bfloat16") for part in scales)
        assert found == (planned, in_weights)


def test_plan_of_a_70b_halves_the_cache_but_for_the_scales(capsys):
    """40 KiB a token and rank in 16 bit: 160 numbers of 128, each now with 4 bytes of scale."""
    words = ("model=llama2_70b", "quant=rtn_c8", "parallel.tp=8", "plan.bandwidth_gb_s=100")
    assert main(["plan", "plan.json=true", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sizes"]["8"]["kv_cache_bytes"] == 160 * (128 + 4) * 4096


def test_bench_counts_a_byte_a_number_and_the_scales():
    case = Case(batch_size=2, prompt_length=5, new_tokens=1, chunk=64)
    work = {}
    for scheme in (QuantScheme(), C8):
        memory = Memory(open_checkpoint(DEMO).layout(scheme), "bfloat16")
        work[scheme.label] = decode_work(memory, case, range(2), 2).num_bytes
    config = open_checkpoint(DEMO).config
    entries = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * 6
    assert work["none"] - work["c8"] == entries * (config.head_dim - 4)
