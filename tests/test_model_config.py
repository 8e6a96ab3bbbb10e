"""What is read of a `config.json`: as transformers reads it, or refused by name."""

from __future__ import annotations

import itertools
import logging
import math
import random

import pytest
import torch
import yaml

from parallel.errors import CheckpointError, ModelError
from parallel.model.config import ModelConfig
from parallel.model.families import FAMILIES, NEUTRAL
from parallel.model.rope import cos_sin_table, inverse_frequencies
from tests.checkpoints import CONFIG, random_weights, write_checkpoint, write_weights

SHAPE = {
    "vocab_size": 131, "hidden_size": 512, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 32, "num_key_value_heads": 4,
}  # fmt: skip
KINDS = [name.removesuffix("ForCausalLM") for name in FAMILIES]
SLIDING, FULL = "sliding_attention", "full_attention"


def config(kind: str = "Llama", **values: object) -> ModelConfig:
    return ModelConfig.from_hf({**SHAPE, "architectures": [f"{kind}ForCausalLM"], **values})


@pytest.fixture(scope="module")
def transformers():
    found = pytest.importorskip("transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return found


# Of each key, what may stand there besides nothing.
CHOICES = {
    "head_dim": (24,),
    "max_position_embeddings": (64,),
    "rms_norm_eps": (1e-5,),
    "tie_word_embeddings": (True,),
    "sliding_window": (16, None),
    "use_sliding_window": (True, True, False),
    "max_window_layers": (0, 2, 9),
    "layer_types": ([SLIDING, FULL, FULL, SLIDING], [FULL] * 4, None),
    "rope_theta": (5e5,),
}


def test_keys_given_and_left_out_mean_what_they_mean_in_transformers(transformers):
    generator = random.Random(0)
    num_read = dict.fromkeys(KINDS, 0)
    for kind, _ in itertools.product(KINDS, range(60)):
        keys = [key for key in CHOICES if generator.random() < 0.5]
        values = {key: generator.choice(CHOICES[key]) for key in keys}
        if kind == "Llama":
            values.pop("sliding_window", None)
        theirs = getattr(transformers, f"{kind}Config")(**{**SHAPE, **values})
        ours = read(kind, values)
        if ours is None:
            continue
        num_read[kind] += 1
        for key in ("max_position_embeddings", "rms_norm_eps"):
            assert getattr(ours, key) == getattr(theirs, key), (kind, values)
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16), (kind, values)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert list(ours.windows) == windows_of(kind, theirs), (kind, values)
    assert min(num_read.values()) > 25


def read(kind: str, values: dict) -> ModelConfig | None:
    """None where layer_types are refused, on which transformers fails later, or passes them over."""
    try:
        return config(kind, **values)
    except ModelError as error:
        if "layer_types" not in str(error):
            raise
        return None


def windows_of(kind: str, theirs) -> list[int | None]:
    """As the modeling files of transformers take them from their config."""
    if kind == "Llama":
        return [None] * 4
    if kind == "Mistral":
        return [theirs.sliding_window] * 4
    return [theirs.sliding_window if name == SLIDING else None for name in theirs.layer_types]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ROPES = {
    "none": {},
    "null": {"rope_scaling": None, "rope_theta": 1e6},
    "default": {"rope_scaling": {"rope_type": "default"}},
    "linear of old": {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 5e5},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e5}},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "theta inside and beside": {
        "rope_scaling": {**LLAMA3, "rope_theta": 2e4}, "rope_theta": 5e5,
    },
    "theta beside parameters": {"rope_parameters": LLAMA3, "rope_theta": 5e5},
    "yarn": {"rope_scaling": YARN, "rope_theta": 1e6},
    "yarn of old": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "yarn factor": {"rope_scaling": {**YARN, "attention_factor": 1.3}},
    "yarn mscale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.4}},
    "yarn one mscale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0}},
    "yarn as published": {"rope_scaling": {**YARN, "finetuned": True}},
    "yarn betas": {"rope_scaling": {**YARN, "beta_fast": 4, "beta_slow": 0.5, "truncate": False}},
    "yarn of a point": {
        "rope_scaling": {**YARN, "original_max_position_embeddings": 4, "beta_fast": 900.0,
                         "beta_slow": 800.0},
    },
    "yarn that shrinks": {"rope_scaling": {**YARN, "factor": 0.5}},
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rotary_angles_are_those_of_transformers(transformers, rope):
    values = {**SHAPE, "head_dim": 48}
    theirs = transformers.LlamaConfig(**values, **{key: copied(rope[key]) for key in rope})
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    ours = config(head_dim=48, **rope)
    # A few roundings of float32.
    torch.testing.assert_close(inverse_frequencies(ours), rotary.inv_freq, rtol=1e-6, atol=0)
    wanted_cos, wanted_sin = rotary(torch.empty(1), torch.arange(200)[None])
    cos, sin = cos_sin_table(ours, 200, torch.float32)
    # Angles of up to 200 radians have steps of 1.5e-5.
    torch.testing.assert_close(cos[:, 0], wanted_cos[0], rtol=0, atol=5e-5)
    torch.testing.assert_close(sin[:, 0, 24:], wanted_sin[0, :, 24:], rtol=0, atol=5e-5)


def copied(value):
    """transformers writes into what it is given."""
    return dict(value) if isinstance(value, dict) else value


REFUSED = {
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "longrope": {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
    "default, linear, llama3, yarn": {"rope_scaling": {"rope_type": ["yarn"], "factor": 2.0}},
    "rope_parameters: full_attention": {"rope_parameters": {FULL: {"rope_theta": 1e4}}},
    "rope_scaling: mrope_section": {"rope_scaling": {"type": "default", "mrope_section": [1]}},
    "rope_scaling: partial_rotary_factor": {"rope_scaling": {"partial_rotary_factor": 0.5}},
    "rope_scaling: rope_type": {"rope_scaling": {"factor": 2.0}},
    "rope_scaling must be an object": {"rope_scaling": 2.0},
    "rope_scaling: factor": {"rope_scaling": {"rope_type": "yarn"}},
    "rope_scaling: beta_fast must be above": {"rope_scaling": {**YARN, "beta_fast": 0.5}},
    "rope_scaling: truncate": {"rope_scaling": {**YARN, "truncate": 1}},
    "rope_scaling: attention_factor": {"rope_scaling": {**YARN, "attention_factor": -1.0}},
    "rope_scaling: mscale": {"rope_scaling": {**YARN, "mscale": "1", "mscale_all_dim": 1.0}},
    "rope_theta must be above 1": {"rope_scaling": YARN, "rope_theta": 1.0},
    "rope_theta must be a number": {"rope_scaling": {**YARN, "rope_theta": math.nan}},
    "sliding_window must be null or at least 2048": {"sliding_window": 16},
    "layer_types must be full_attention": {"layer_types": [FULL, SLIDING, FULL, FULL]},
    "hidden_act": {"hidden_act": "gelu_pytorch_tanh"},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_llama_cannot_do_is_refused_by_name(words):
    with pytest.raises(ModelError, match=words):
        config(**REFUSED[words])


REFUSED_OF = {
    "layer_types must be a list of 4": ("Qwen3", {"layer_types": [FULL]}),
    "each full_attention or sliding_attention": (
        "Qwen2", {"layer_types": [FULL, FULL, FULL, "chunked_attention"]},
    ),
    "must have no sliding_attention without": ("Qwen3", {"layer_types": [SLIDING] * 4}),
    "layer_types must be sliding_attention": ("Mistral", {"layer_types": [FULL] * 4}),
    "sliding_window must be an integer of 1": ("Mistral", {"sliding_window": 0}),
    "max_window_layers must be an integer of 0": (
        "Qwen2", {"use_sliding_window": True, "max_window_layers": -1},
    ),
    "use_sliding_window must be true or false": ("Qwen3", {"use_sliding_window": 1}),
    "attention_bias must be false": ("Mistral", {"attention_bias": True}),
    "attention_bias must be true": ("Qwen2", {"attention_bias": False}),
    "mlp_bias must be false": ("Qwen3", {"mlp_bias": True}),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED_OF)
def test_what_a_family_cannot_do_is_refused_by_name(words):
    kind, values = REFUSED_OF[words]
    with pytest.raises(ModelError, match=words):
        config(kind, **values)


@pytest.mark.parametrize("key", NEUTRAL)
def test_key_of_another_architecture_is_refused_unless_it_changes_nothing(key):
    for value in (*NEUTRAL[key], None):
        config(**{key: value})
    with pytest.raises(ModelError, match=f"{key} must be"):
        config(**{key: 7.5})


@pytest.mark.parametrize("architectures", [["Gemma3ForCausalLM"], ["LlamaForSequence"], [3], 7])
def test_unknown_architecture_is_refused_with_the_known_ones(architectures):
    with pytest.raises(ModelError, match=f"{', '.join(FAMILIES)} .write model.architectures="):
        config(architectures=architectures, model_type="llama")


@pytest.mark.parametrize("kind", KINDS)
def test_architecture_that_is_left_out_is_that_of_the_model_type(transformers, kind):
    theirs = getattr(transformers, f"{kind}Config").model_type
    auto = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for architectures in (None, [], [f"{kind}Model"], [f"{kind.upper()}ForCausalLM"]):
        found = config(architectures=architectures, model_type=theirs)
        assert found.architecture == auto[theirs] == f"{kind}ForCausalLM"


@pytest.mark.parametrize("model_type", [None, "gpt2"])
def test_architecture_that_nothing_says_is_asked_for(model_type):
    with pytest.raises(ModelError, match=r"write model.architectures=\[NAME\]\), but is None"):
        config(architectures=None, model_type=model_type)


@pytest.mark.parametrize(
    ("said", "ids"),
    [(None, ()), (2, (2,)), ([2, 7, 2], (2, 7)), (-1, ()), ([-1, 7], (7,)), ([], ())],
)
def test_end_of_sequence_is_a_token_some_or_none(said, ids):
    assert config(eos_token_id=said).eos_token_ids == ids


@pytest.mark.parametrize("said", [-2, 1.0, True, "2", [[2]], {"a": 1}, ["x" * 5000]])
def test_end_of_sequence_that_is_no_token_is_refused(said):
    with pytest.raises(ModelError, match="eos_token_id must be a token id, -1 for none") as error:
        config(eos_token_id=said)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["int8", "torch.int8", "", 16, ["float32"]])
def test_dtype_that_is_none_is_refused(name):
    for key in ("torch_dtype", "dtype"):
        with pytest.raises(ModelError, match="torch_dtype must be one of"):
            config(**{key: name})


def test_presets_are_models_of_a_family():
    from importlib.resources import files

    presets = [path for path in files("conf.model").iterdir() if path.name.endswith(".yaml")]
    shapes = {path.name: yaml.safe_load(path.read_text()) for path in presets}
    found = {name: ModelConfig.from_hf(values) for name, values in shapes.items() if values}
    assert len(found) > 10
    windows = {
        name for name, shape in found.items() if shape.windows[0] and shape.windows[0] < 32768
    }
    assert windows == {"mistral_7b_v01.yaml"}
    assert found["qwen3_32b.yaml"].head_dim == 128


# Names of tensors


def test_tensor_that_every_loader_computes_anew_is_dropped_and_no_other(tmp_path):
    from parallel.checkpoint.open import open_checkpoint
    from quant.scheme import QuantScheme

    path = write_checkpoint(tmp_path)
    weights = random_weights(CONFIG, torch.float32, 0)
    dropped = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(2)}
    write_weights(path, weights | dropped)
    open_checkpoint(path).layout(QuantScheme())
    for name in ("model.layers.0.self_attn.masked_bias", "model.layers.0.self_attn.q_norm.weight"):
        write_weights(path, weights | {name: torch.ones(16)})
        with pytest.raises(CheckpointError, match=f"does not know, first {name}"):
            open_checkpoint(path).layout(QuantScheme())
