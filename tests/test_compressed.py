"""compressed-tensors: the words of its files, its configurations, and transformers as the judge."""

from __future__ import annotations

import json
import shutil
import warnings
from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file

from launcher.__main__ import main
from launcher.prompts import DEMO_PROMPTS
from launcher.resolve import DEMO
from launcher.text import open_tokenizer
from parallel.checkpoint.compressed.config import (
    CompressedLinear,
    format_of,
    write_quantization,
)
from parallel.checkpoint.compressed.groups import read_quantization, to_scheme
from parallel.checkpoint.compressed.words import from_words, num_words, to_words, words_of
from parallel.checkpoint.open import open_checkpoint
from parallel.errors import CheckpointError, ModelError
from quant.errors import QuantError
from quant.numeric import pack_int4
from quant.scheme import LinearScheme, QuantScheme
from tests.checkpoints import write_checkpoint
from tests.models import RTN, generate, logits
from tests.test_export import PACKED, SCHEMES, SHAPE, export, make_scheme, read_all
from tests.test_prepared import prepare

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def stored(values: torch.Tensor, bits: int) -> torch.Tensor:
    return pack_int4(values) if bits == 4 else values


def random_integers(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)


# ------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("bits", "row", "words"),
    [
        (4, [-8, -7, -6, -5, -4, -3, -2, -1], [0x76543210]),
        (4, [0, 1, 2, 3, 4, 5, 6, 7], [0xFEDCBA98]),
        (4, [7, 7, 7], [0x00000FFF]),
        (4, [0, 0, 0, 0, 0, 0, 0, 0, -7], [0x88888888, 0x00000001]),
        (8, [-128, -127, 0, 127], [0xFF800100]),
        (8, [1, 2, 3, 4, 5], [0x84838281, 0x00000085]),
    ],
)
def test_words_hold_the_first_column_lowest_and_half_the_range_is_added(bits, row, words):
    """Worked out by hand: value + 8 (or 128), shifted by 4 (or 8) bits times its place."""
    found = to_words(stored(torch.tensor([row], dtype=torch.int8), bits), len(row), bits)
    assert found.dtype == torch.int32
    assert [word & 0xFFFFFFFF for word in found[0].tolist()] == words


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 127])
def test_every_slice_of_words_is_the_slice_of_the_integers(bits, columns):
    expected = stored(random_integers(3, columns, bits), bits)
    words = to_words(expected, columns, bits)
    assert words.shape == (3, num_words(columns, bits))
    for start in range(expected.shape[1]):
        for stop in range(start + 1, expected.shape[1] + 1):
            held = words[:, words_of(start, stop)].contiguous()
            found = from_words(held, start, stop, bits, columns)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected[:, start:stop])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 2, 3, 8, 31, 32, 33, 127, 256])
def test_words_are_those_of_compressed_tensors(bits, columns):
    helpers = pytest.importorskip("compressed_tensors.compressors")
    values = random_integers(5, columns, bits)
    words = helpers.pack_to_int32(values, bits)
    assert torch.equal(to_words(stored(values, bits), columns, bits), words)
    assert torch.equal(helpers.unpack_from_int32(words, bits, values.shape), values)
    whole = -(-columns * bits // 8)
    assert torch.equal(from_words(words, 0, whole, bits, columns), stored(values, bits))


# -------------------------------------------------------------------------------- transformers reads


@pytest.fixture
def transformers():
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    return pytest.importorskip("transformers")


def load_judge(transformers, path, dtype=torch.float32):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own making
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True
        )
        model(torch.tensor([[1]]))  # it unpacks its weights now
    assert not any(info.values()), info
    return model.eval()


def judge_text(model, prompt, new_tokens):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


# Of the demo model's training text, so that its greedy choices are clear ones.
PROMPTS = [open_tokenizer(DEMO).encode(text) for text in DEMO_PROMPTS]


def prepare_demo(name, folder):
    prepared = prepare(DEMO, folder / "tp2", 2, make_scheme(name))
    return prepared, export(prepared, folder / "hf")


@pytest.mark.parametrize("name", PACKED)
def test_transformers_loads_an_export_and_says_the_same(name, transformers, tmp_path):
    prepared, path = prepare_demo(name, tmp_path)
    model = load_judge(transformers, path)
    completions = generate(prepared, PROMPTS, 2, new_tokens=30)
    for index, prompt in enumerate(PROMPTS):
        ours = list(completions[index].token_ids)
        assert judge_text(model, prompt, len(ours)) == ours
        text = prompt + ours
        with torch.no_grad():
            expected = model(torch.tensor([text])).logits[0, :-1]
        # float32 both, and the same dequantized weights: what is left is the order of sums.
        torch.testing.assert_close(logits(prepared, text, 2), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["w8a8", "w4a8 g32", "mixed"])
def test_transformers_says_the_same_of_int8_activations(name, transformers, tmp_path):
    prepared, path = prepare_demo(name, tmp_path)
    model = load_judge(transformers, path)
    ours = list(generate(prepared, PROMPTS[:1], 2, new_tokens=30)[0].token_ids)
    assert judge_text(model, PROMPTS[0], len(ours)) == ours
    text = PROMPTS[0] + ours
    with torch.no_grad():
        expected = model(torch.tensor([text])).logits[0, :-1]
    # An activation halfway between two steps goes either way, and takes what follows with it:
    # transformers' own float32 and float64 differ by 0.17 here, of logits that reach 20.
    torch.testing.assert_close(logits(prepared, text, 2), expected, rtol=0, atol=0.5)


@pytest.mark.parametrize("name", ["w8a8", "w4a8 g32", "mixed"])
def test_logits_of_int8_activations_differ_in_the_width_of_a_step_alone(
    name, transformers, tmp_path, monkeypatch
):
    """The library divides a row's largest value by 127.5; with the 127 of vLLM's kernels and ours in
    its place, logits of one token, where few activations stand halfway, are equal."""
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")

    def scales_of_127(value, args, module, global_scale=None):
        amax = value.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
        return amax / 127, torch.zeros_like(amax)

    prepared, path = prepare_demo(name, tmp_path)
    model = load_judge(transformers, path)
    monkeypatch.setattr(forward, "compute_dynamic_scales_and_zp", scales_of_127)
    distances = []
    for token in (1, 7, 99, 260, 306, 536, 1511, 2000):
        ours = logits(prepared, [token, 1], 1)
        with torch.no_grad():
            expected = model(torch.tensor([[token]])).logits[0]
        distances.append((ours - expected).abs().max().item())
    assert sum(distance < 1e-4 for distance in distances) >= 4, distances


def test_transformers_takes_a_quantized_lm_head_of_a_tied_model(transformers, tmp_path):
    scheme = QuantScheme(quant_method="rtn", weight_dtype="int8", modules_to_not_convert=())
    prepared = prepare(DEMO, tmp_path / "tp2", 2, scheme)
    model = load_judge(transformers, export(prepared, tmp_path / "hf"))
    expected = list(generate(prepared, PROMPTS[:1], 2, new_tokens=30)[0].token_ids)
    assert judge_text(model, PROMPTS[0], len(expected)) == expected


# ------------------------------------------------------------------------- its configurations, read

MODULES = [
    *(f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkvo"),
    *(f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up", "down")),
    "lm_head",
]  # fmt: skip
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
W8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
A8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def config_of(group, **values):
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
            **values,
        }
    }


def schemes_of(config):
    linears = read_quantization(config, MODULES, "config.json")
    return {name: linear.scheme for name, linear in linears.items() if linear}


def test_a_config_of_llm_compressor_is_read():
    """As RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16 has it, all keys of its release."""
    weights = {
        "actorder": "weight", "block_structure": None, "dynamic": False, "group_size": 128,
        "num_bits": 4, "observer": "mse", "observer_kwargs": {}, "strategy": "group",
        "symmetric": True, "type": "int",
    }  # fmt: skip
    group = {
        "input_activations": None, "output_activations": None, "targets": ["Linear"],
        "weights": weights,
    }  # fmt: skip
    config = config_of(
        group, global_compression_ratio=1.89, kv_cache_scheme=None, version="0.8.0",
        quantization_status="compressed", sparsity_config={}, transform_config={},
    )  # fmt: skip
    found = schemes_of(config)
    assert set(found.values()) == {LinearScheme("int4", 128)}
    assert MODULES[-1] not in found
    linears = read_quantization(config, MODULES, "config.json")
    assert to_scheme(linears) == QuantScheme(quant_method="rtn", **SCHEMES["w4a16 g128"])


def test_a_name_comes_before_a_class_and_ignore_before_both():
    groups = {
        "group_0": {"targets": ["Linear"], "weights": W4},
        "group_1": {"targets": [r"re:.*down_proj$", Q.replace("q_proj", "o_proj")], "weights": W8},
    }
    ignore = ["lm_head", "re:.*layers.1.mlp.*"]
    found = schemes_of(config_of({}, config_groups=groups, ignore=ignore))
    assert found[Q] == LinearScheme("int4", 128)
    assert found[DOWN] == LinearScheme("int8")
    assert found[Q.replace("q_proj", "o_proj")] == LinearScheme("int8")
    assert found[Q.replace("0", "1")] == LinearScheme("int4", 128)
    assert not any("layers.1.mlp" in name for name in found)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_written_is_read_as_the_same_schemes(name):
    schemes = make_scheme(name).for_modules(MODULES)
    held = {name: at and CompressedLinear(at, format_of(at)) for name, at in schemes.items()}
    config = {"quantization_config": write_quantization(held)}
    linears = read_quantization(json.loads(json.dumps(config)), MODULES, "config.json")
    assert {name: linear and linear.scheme for name, linear in linears.items()} == schemes
    assert to_scheme(linears).for_modules(MODULES) == schemes


GROUP = {"targets": ["Linear"], "weights": W4}
MALFORMED = {
    "zero points": (config_of({**GROUP, "weights": {**W4, "symmetric": False}}),
                    "weights.symmetric must be true .*zero points"),
    "true as a number": (config_of({**GROUP, "weights": {**W4, "symmetric": 1}}), "symmetric"),
    "columns in another order": (config_of({**GROUP, "weights": {**W4, "actorder": "group"}}),
                                 "weights.actorder .*g_idx"),
    "three bits": (config_of({**GROUP, "weights": {**W4, "num_bits": 3}}), "num_bits .* 3;"),
    "fp8": (config_of({**GROUP, "weights": {**W8, "type": "float"}}), "weights.type .*fp8"),
    "fp8 format": (config_of(GROUP, format="float-quantized"), "format .*'float-quantized'"),
    "2:4 sparsity": (
        config_of(GROUP, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config .*2:4"),
    "marlin": (config_of(GROUP, format="marlin-24"), "format .*'marlin-24'"),
    "one scale a tensor": (config_of({**GROUP, "weights": {**W8, "strategy": "tensor"}}),
                           "strategy .*'tensor'"),
    "no strategy": (config_of({**GROUP, "weights": {"num_bits": 8}}), "strategy .*None"),
    "groups of 48": (config_of({**GROUP, "weights": {**W4, "group_size": 48}}), "group_size .* 48;"),
    "groups of no size": (config_of({**GROUP, "weights": {**W4, "group_size": None}}),
                          "group_size must be the columns"),
    "channels with a size": (config_of({**GROUP, "weights": {**W8, "group_size": 64}}),
                             "group_size must be null beside strategy channel"),
    "asymmetric activations": (
        config_of({"targets": ["Linear"], "weights": W8,
                   "input_activations": {**A8, "symmetric": False}}, format="int-quantized"),
        "input_activations.symmetric"),
    "activations beside packed words": (config_of({**GROUP, "input_activations": A8}),
                                        "input_activations must be null beside pack"),
    "quantized outputs": (config_of({**GROUP, "output_activations": A8}), "output_activations"),
    "scales of a KV cache": (config_of(GROUP, kv_cache_scheme={**A8, "type": "float"}),
                             "kv_cache_scheme .*KV cache"),
    "rotations": (config_of(GROUP, transform_config={"config_groups": {"R1": {}}}),
                  "transform_config .*rotations"),
    "unknown key": (config_of(GROUP, bits=4), "the key 'bits'"),
    "unknown key of weights": (config_of({**GROUP, "weights": {**W4, "bits": 4}}),
                               "weights has the key 'bits'"),
    "mixed without saying": (config_of(GROUP, format="mixed-precision"), "group_0.format"),
    "preset": (config_of(["Linear"]), "group_0 must be an object .*presets"),
    "no groups": (config_of(GROUP, config_groups={}), "config_groups"),
    "no weights": (config_of({"targets": ["Linear"]}), "weights must be an object"),
    "target of no module": (config_of({**GROUP, "targets": ["re:.*w2$"]}), "targets .*'re:.*w2"),
    "another class": (config_of({**GROUP, "targets": ["Linear", "Embedding"]}), "'Embedding'"),
    "broken expression": (config_of({**GROUP, "targets": ["re:("]}), "regular expressions"),
    "ignore as text": (config_of(GROUP, ignore="lm_head"), "ignore must be a list"),
    "all ignored": (config_of(GROUP, ignore=["Linear"]), "must quantize a linear"),
    "weights not compressed": (config_of(GROUP, quantization_status="initialized"),
                               "quantization_status"),
    "groups that disagree": (
        config_of({}, config_groups={
            "a": {"targets": ["re:.*down_proj"], "weights": W4},
            "b": {"targets": ["re:.*layers.0.*"], "weights": W8}}),
        r"must say one thing of model.layers.0.mlp.down_proj, but is \['a', 'b'\]"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_config_is_refused_with_a_sentence(fault):
    config, says = MALFORMED[fault]
    with pytest.raises(CheckpointError, match=says) as caught:
        read_quantization(deepcopy(config), MODULES, "config.json")
    text = str(caught.value)
    assert text.startswith("config.json: quantization_config")
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 500


# ----------------------------------------------------------------------------- checkpoints, damaged


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    source = write_checkpoint(folder / "source", **SHAPE)
    for name in ("w4a16 g32", "w8a8", "w4a8 g32"):
        export(prepare(source, folder / f"tp {name}", 2, make_scheme(name)), folder / name)
    return folder


def damage_tensors(path, edit):
    tensors = read_all(path)
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def damage_config(path, edit):
    values = json.loads((path / "config.json").read_text())
    edit(values["quantization_config"])
    (path / "config.json").write_text(json.dumps(values))


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


DAMAGED = {
    "words missing": ("w4a16 g32", lambda t: t.pop(f"{Q}.weight_packed"), f"lacks {Q}.weight_packed"),
    "scales missing": ("w8a8", lambda t: t.pop(f"{Q}.weight_scale"), f"lacks {Q}.weight_scale"),
    "scales of channels": ("w4a16 g32", put(f"{Q}.weight_scale", torch.ones(128, 1)),
                           r"must be float32 or .*\[128, 4\] .*is float32 \[128, 1\]"),
    "scales that are integers": (
        "w8a8", put(f"{Q}.weight_scale", torch.ones(128, 1, dtype=torch.int8)), "is int8"),
    "words of another type": (
        "w4a16 g32", put(f"{Q}.weight_packed", torch.ones(128, 16, dtype=torch.int8)), "is int8"),
    "words of another shape": (
        "w4a16 g32", put(f"{Q}.weight_shape", torch.tensor([128, 127])), r"is \[128, 127\]"),
    "zero points": ("w4a16 g32", put(f"{Q}.weight_zero_point", torch.zeros(16, 4, dtype=torch.int32)),
                    "zero points of asymmetric"),
    "g_idx": ("w4a16 g32", put(f"{Q}.weight_g_idx", torch.zeros(128, dtype=torch.int32)), "g_idx"),
    "a norm of integers": (
        "w8a8", put("model.norm.weight", torch.ones(128, dtype=torch.int8)), "norm.weight is int8"),
    "a tensor too many": ("w8a8", put("model.foo", torch.ones(1)), "model.foo"),
    "an embedding missing": ("w8a8", lambda t: t.pop("model.embed_tokens.weight"), "embed_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGED)
def test_damaged_tensors_are_refused(fault, exports, tmp_path):
    form, edit, says = DAMAGED[fault]
    path = tmp_path / "damaged"
    shutil.copytree(exports / form, path)
    damage_tensors(path, edit)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(path).layout(QuantScheme())


def test_config_that_leaves_out_what_the_files_quantize_is_refused(exports, tmp_path):
    path = tmp_path / "damaged"
    shutil.copytree(exports / "w8a8", path)
    damage_config(path, lambda values: values["ignore"].append("re:.*down_proj$"))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight"):
        open_checkpoint(path).layout(QuantScheme())


def test_config_that_divides_a_fused_product_is_refused(exports, tmp_path):
    path = tmp_path / "damaged"
    shutil.copytree(exports / "w4a16 g32", path)
    damage_config(path, lambda values: values["ignore"].append(Q))
    damage_tensors(
        path,
        lambda tensors: (
            [tensors.pop(f"{Q}.weight_{part}") for part in ("packed", "scale", "shape")]
            and tensors.update({f"{Q}.weight": torch.ones(128, 128)})
        ),
    )
    with pytest.raises(QuantError, match="q_proj unquantized"):
        open_checkpoint(path).layout(QuantScheme())


def test_integers_beyond_their_bits_are_refused(exports, tmp_path):
    path = tmp_path / "damaged"
    shutil.copytree(exports / "w4a8 g32", path)
    damage_tensors(path, lambda tensors: tensors[f"{Q}.weight"].fill_(8))
    with pytest.raises(CheckpointError, match=r"integers of 4 bits .* holds 8 to 8"):
        generate(path, [[1]], 1, new_tokens=1)


def test_quant_that_contradicts_is_refused_and_what_agrees_is_taken(exports):
    path = exports / "w4a16 g32"
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"as w4a16 g32 by its config.json.*asks for w8a16"):
        checkpoint.layout(RTN)
    agreed = checkpoint.layout(make_scheme("w4a16 g32"))
    assert agreed.schemes == checkpoint.layout(QuantScheme()).schemes


def test_commands_take_an_export_and_say_its_scheme(exports, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = exports / "w4a16 g32"
    assert main(["plan", f"checkpoint={path}", "plan.bandwidth_gb_s=10"]) == 0
    assert "scheme w4a16 g32" in capsys.readouterr().out
    assert main(["plan", f"checkpoint={path}", "quant=rtn_a16w8"]) == 2
    assert "asks for w8a16" in capsys.readouterr().err
    words = ("generation.max_new_tokens=3", "prompt=Hello", "parallel.tp=2", "run_root=runs")
    assert main(["generate", f"checkpoint={path}", *words]) == 0
    run = next(tmp_path.glob("runs/*/*"))
    assert "weight_dtype: int4" in (run / "run.yaml").read_text()


def test_other_methods_are_still_refused(tmp_path):
    path = write_checkpoint(tmp_path / "awq", quantization_config={"quant_method": "awq"})
    with pytest.raises(ModelError, match="'awq'"):
        open_checkpoint(path)
