"""Every family against transformers: prefill, decode, windows, and the int8 KV cache."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.calibration.forward import LayerForward
from parallel.calibration.read import embed, read_layer
from parallel.calibration.recipes import recipe_of
from parallel.calibration.result import MODULES
from parallel.calibration.walk import Calibration, calibrate
from parallel.checkpoint.open import Checkpoint, open_checkpoint
from parallel.checkpoint.readers.calibrated import CalibratedSource
from parallel.checkpoint.store import write_prepared
from parallel.generation.score import score
from parallel.group import LoneGroup
from parallel.model import captured
from parallel.model.decoder import Decoder, Segment, Step
from quant import attention
from quant.elementwise import rms_norm
from quant.kernels.native import NativeKernel
from quant.kernels.native.calls import is_available
from quant.numeric import Grid
from quant.rounding import quantize
from quant.scheme import QuantScheme
from tests.models import RTN, generate, load, run_ranks
from tests.test_captured import programs, texts
from tests.test_prepared import merged
from tests.test_static_activations import input_rounding

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
# 8 heads of 16: wider together than the hidden size, and fewer kv heads than ranks.
WIDE = {"head_dim": 16, "num_attention_heads": 8}
THETA = {"rope_theta": 10000.0}
LLAMA3 = {
    **THETA, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES = {
    "llama2": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}),
    "llama3": ("Llama", {**WIDE, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama3.2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "head_dim": 48}),
    "llama linear": ("Llama", {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 4.0}}),
    "llama yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral v0.1": ("Mistral", {**WIDE, "sliding_window": 16}),
    "mistral v0.3": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"sliding_window": 8}),
    "qwen2.5 window": (
        "Qwen2", {**WIDE, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
    ),
    "qwen2.5 yarn": ("Qwen2", {"rope_parameters": {**YARN, "beta_fast": 4.0, "truncate": False}}),
    "qwen3": ("Qwen3", {**WIDE, "tie_word_embeddings": True}),
    "qwen3 bias": ("Qwen3", {"head_dim": 32, "attention_bias": True}),
    "qwen3 layer types": (
        "Qwen3", {**WIDE, "use_sliding_window": True, "sliding_window": 20,
                  "layer_types": [SLIDING, FULL, SLIDING], "rope_parameters": YARN},
    ),
}  # fmt: skip
WINDOWED = ["mistral v0.1", "qwen2.5 window", "qwen3 layer types"]
NUM_PROMPT = 40
IDS = torch.randint(3, 131, (46,), generator=torch.Generator().manual_seed(3)).tolist()
# float32 over 3 layers, sums in another order: 1e-5 of logits of up to some 30.
FLOAT32 = {"rtol": 1e-4, "atol": 3e-4}


@dataclass(frozen=True)
class Made:
    """A random model as transformers writes it, and its logits of IDS."""

    checkpoint: Checkpoint
    model: torch.nn.Module
    logits_TV: torch.Tensor

    @property
    def path(self) -> Path:
        return self.checkpoint.path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Made when they are first asked for."""
    made: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("model"))
        return made[name]

    return get


def make(name: str, path: Path) -> Made:
    kind, overrides = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **overrides})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        # transformers starts these at 0 and 1, where a bug would not show.
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter)
        elif "norm" in parameter_name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    with torch.no_grad():
        return Made(open_checkpoint(path), model, model(torch.tensor([IDS])).logits[0])


def rank_logits(decoder: Decoder, chunk: int = NUM_PROMPT) -> torch.Tensor | None:
    """Logits of IDS, [T, V]: of a prompt in chunks, and of the decode steps that follow."""
    cache = decoder.new_cache(1, len(IDS))
    parts = [decoder(prefill(start, chunk), cache) for start in range(0, NUM_PROMPT, chunk)]
    parts += [decoder(decode(place), cache) for place in range(NUM_PROMPT, len(IDS))]
    return None if parts[0] is None else torch.cat(parts)


def prefill(start: int, chunk: int) -> Step:
    stop = min(start + chunk, NUM_PROMPT)
    places = torch.arange(start, stop)
    segment = Segment(0, 0, stop - start, stop)
    return Step(torch.tensor(IDS)[places], places, places, places - start, (segment,))


def decode(place: int) -> Step:
    places = torch.tensor([place])
    return Step(torch.tensor(IDS)[places], places, places, torch.tensor([0]), length=place + 1)


def logits(
    checkpoint: Checkpoint,
    size: int,
    scheme: QuantScheme = QuantScheme(),  # noqa: B008  # frozen
    chunk: int = NUM_PROMPT,
) -> torch.Tensor:
    def work(group):
        return rank_logits(load(checkpoint, group, scheme, length=len(IDS)), chunk)

    return run_ranks(size, work)[0]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def sizes(name: str) -> list[int]:
    return [1, 2, 4, 8] if FAMILIES[name][1].get("num_attention_heads") == 8 else [1, 2, 4]


CASES = [(name, size) for name in FAMILIES for size in sizes(name)]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_prefill_and_decode_give_the_logits_of_transformers(models, name, size):
    """Ranks that drifted apart would give other logits: each has its own part of every sum."""
    made = models(name)
    torch.testing.assert_close(logits(made.checkpoint, size), made.logits_TV, **FLOAT32)


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("name", [*WINDOWED, "qwen3"])
def test_prefill_in_chunks_equals_prefill_at_once(models, name, chunk):
    made = models(name)
    torch.testing.assert_close(logits(made.checkpoint, 2, chunk=chunk), made.logits_TV, **FLOAT32)


@pytest.mark.parametrize("name", WINDOWED)
def test_decode_by_torch_has_the_same_window(models, name, monkeypatch):
    """As on a GPU, or where nothing was compiled."""
    monkeypatch.setattr(attention.native, "can_attend", lambda *_: False)
    made = models(name)
    torch.testing.assert_close(logits(made.checkpoint, 1), made.logits_TV, **FLOAT32)


@pytest.mark.parametrize(
    ("name", "path"), [("qwen2.5 window", "native"), ("qwen3 layer types", "torch")]
)
def test_sequences_of_unequal_length_each_have_their_window(models, name, path, monkeypatch):
    if path == "torch":
        monkeypatch.setattr(attention.native, "can_attend", lambda *_: False)
    prompts = [IDS[:30], IDS[5:8], IDS[10:22]]
    together = generate(models(name).checkpoint.path, prompts, 1, new_tokens=20, rows=3, chunk=13)
    for index, prompt in enumerate(prompts):
        alone = generate(models(name).checkpoint.path, [prompt], 2, new_tokens=20)[0]
        assert together[index].token_ids == alone.token_ids


# Quantization


def reference_logits(made: Made, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Those of transformers with what quantized tensors stand for in place of the model's own."""
    model = deepcopy(made.model).double()
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight_scale")}
    weights = {
        name.removesuffix("_scale"): tensors[name.removesuffix("_scale")].float() * scale
        for name, scale in scales.items()
    }
    model.load_state_dict({**tensors, **weights}, strict=False)
    for name, module in model.named_modules():
        if (scale := tensors.get(f"{name}.input_scale")) is not None:
            module.register_forward_pre_hook(input_rounding(scale))
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float()


@pytest.mark.parametrize("name", FAMILIES)
def test_rtn_gives_the_logits_of_the_rounded_weights(models, name):
    made = models(name)
    tensors = {}
    for path, weight in load_file(made.path / "model.safetensors").items():
        if path.endswith("_proj.weight"):
            tensors[path], tensors[path + "_scale"] = quantize(weight, Grid())
    expected = reference_logits(made, tensors)
    assert relative(expected, made.logits_TV) > 0.01
    # Inputs are rounded to 24 bits, and the sums have another order.
    assert relative(logits(made.checkpoint, 2, RTN), expected) < 1e-4


@pytest.mark.parametrize("name", [*WINDOWED, "qwen3"])
def test_int8_cache_decodes_what_it_prefills(models, name):
    scheme = QuantScheme(quant_method="rtn", kvcache_dtype="int8")
    made = models(name)
    found = logits(made.checkpoint, 1, scheme)
    decoder = load(made.checkpoint, LoneGroup(), scheme, length=len(IDS))
    whole = score(decoder, decoder.new_cache(1, len(IDS)), IDS, 1, len(IDS))
    # A last bit may tip a key into the next of 127 steps.
    assert relative(found[:-1], whole) < 1e-3
    assert relative(found, made.logits_TV) < 0.1
    assert relative(logits(made.checkpoint, 2, scheme), found) < 1e-3


@pytest.mark.skipif(not is_available(), reason="no C compiler at installation")
@pytest.mark.parametrize(
    ("dtype", "cache"), [(torch.float32, None), (torch.bfloat16, "int8")], ids=["float", "int8"]
)
@pytest.mark.parametrize("name", [*WINDOWED, "qwen3 bias"])
def test_captured_steps_give_the_text_of_plain_ones(models, name, dtype, cache, monkeypatch):
    """Beyond the window: each run of the program begins to read where its own step's window does."""
    scheme = replace(RTN, kvcache_dtype=cache)
    checkpoint = models(name).checkpoint

    def found() -> tuple[object, int]:
        decoder = load(checkpoint, LoneGroup(), scheme, dtype, kernel=NativeKernel())
        return texts(decoder, new_tokens=40), len(programs(decoder))

    with_programs, num_programs = found()
    assert num_programs == 3
    monkeypatch.setattr(captured, "is_available", lambda: False)
    assert found() == (with_programs, 0)


# Calibration


@pytest.mark.parametrize("name", [*WINDOWED, "qwen3 bias"])
def test_calibration_walks_through_the_model_itself(models, name):
    made = models(name)
    checkpoint = made.checkpoint
    forward = LayerForward(checkpoint.config, torch.float32, len(IDS))
    x_TD = embed(checkpoint.source, {0: IDS}, torch.float32)[0]
    for index in range(checkpoint.config.num_hidden_layers):
        x_TD = forward.run(read_layer(checkpoint.source, checkpoint.config, index), x_TD)
    whole = {key: slice(0, size) for key, size in (("V", 131), ("D", 64))}
    norm_D = checkpoint.source.read("model.norm.weight", (whole["D"],))
    head_VD = checkpoint.source.read("lm_head.weight", (whole["V"], whole["D"]))
    found = rms_norm(x_TD, norm_D, checkpoint.config.rms_norm_eps) @ head_VD.T
    torch.testing.assert_close(found, made.logits_TV, **FLOAT32)


SMOOTH = QuantScheme(
    quant_method="ptq", weight_dtype="int8", activation_dtype="int8",
    outliers_suppression="smooth", act_quant_granularity="per_tensor",
)  # fmt: skip
GPTQ = QuantScheme(quant_method="ptq", weight_dtype="int8", precision_recovery="gptq")
STATIC_CACHE = replace(SMOOTH, kvcache_dtype="int8", kvcache_quant_granularity="per_channel")


def prepare(checkpoint: Checkpoint, scheme: QuantScheme, path: Path) -> Path:
    """The model calibrated on IDS, as shards."""
    layout = checkpoint.layout(scheme)
    work = Calibration(
        checkpoint.config, checkpoint.source, [IDS, IDS[::-1]],
        lambda index: recipe_of(layout, index),
    )  # fmt: skip
    files = []
    for layer in calibrate(work, LoneGroup()):
        files.append(path / f"{layer.index}.safetensors")
        save_file(layer.to_tensors(), files[-1])
    bits = {name: item.bits for name, item in layout.schemes.items()}
    source = CalibratedSource(checkpoint.source, files, MODULES, bits, "")
    write_prepared(layout, source, 2, path / "prepared")
    return path / "prepared"


# An input that float32 tips into the next of 127 steps of a static scale moved these models' logits by
# 0.015; with the norms as they were they are 0.8 away.
@pytest.mark.parametrize(
    ("scheme", "limit"), [(SMOOTH, 0.05), (GPTQ, 1e-4)], ids=["smooth static", "gptq"]
)
@pytest.mark.parametrize("name", ["mistral v0.1", "qwen3 layer types"])
def test_calibrated_model_gives_the_logits_of_its_tensors(models, name, scheme, limit, tmp_path):
    """Folded norms, rounded weights and static inputs, told by transformers."""
    made = models(name)
    prepared = prepare(made.checkpoint, scheme, tmp_path)
    expected = reference_logits(made, merged(prepared))
    assert 1e-3 < relative(expected, made.logits_TV) < 0.2
    for size in (1, 2):
        found = logits(open_checkpoint(prepared), size, scheme)
        assert relative(found, expected) < limit


@pytest.mark.parametrize("name", ["mistral v0.1", "qwen3 layer types"])
def test_static_cache_is_calibrated_behind_norm_and_rotation(models, name, tmp_path):
    """Of keys of another size the scales would let most saturate."""
    made = models(name)
    checkpoint = open_checkpoint(prepare(made.checkpoint, STATIC_CACHE, tmp_path))
    found = logits(checkpoint, 1, STATIC_CACHE)
    assert relative(found, made.logits_TV) < 0.5
    assert relative(logits(checkpoint, 2, STATIC_CACHE, chunk=9), found) < 1e-3
