"""A directory whose YAML says what the model is: MindFormers' form, instead of a config.json."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from launcher.config_file import read_config_file
from launcher.failures import ConfigError
from parallel.checkpoint.config_values import read_config_values
from parallel.checkpoint.mindformers.directory import read_model_file
from parallel.checkpoint.mindformers.yaml_file import MOST_VALUES, parse_yaml, read_yaml_mapping
from parallel.checkpoint.open import open_checkpoint
from parallel.errors import CheckpointError, ModelError
from parallel.model.config import ModelConfig
from quant.scheme import QuantScheme
from tests.checkpoints import CONFIG, write_checkpoint
from tests.golden_stick import their_name
from tests.mindspore_checkpoints import write_ckpt
from tests.models import RTN, generate
from tests.test_prepared import prepare

SHAPE = {
    "type": "LlamaConfig",
    "seq_length": 128,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 2048,
    "intermediate_size": 112,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "compute_dtype": "float32",
    "extend_method": "None",
    "checkpoint_name_or_path": "",
    "max_decode_length": 512,
    "do_sample": False,
}
RTN_BLOCK = {"quant_method": "rtn", "weight_dtype": "int8", "modules_to_not_convert": ["lm_head"]}


def write_yaml(path: Path, block: dict[str, Any] | None = None, **shape: Any) -> Path:
    """A predict YAML of the test checkpoints' shape; None takes a key out."""
    given = {**SHAPE, **shape, **({"quantization_config": block} if block else {})}
    config = {key: value for key, value in given.items() if value is not None}
    model = {"model_config": config, "arch": {"type": "LlamaForCausalLM"}}
    path.write_text(yaml.safe_dump({"use_parallel": False, "model": model}))
    return path


def says(folder: Path, block: dict[str, Any] | None = None, **shape: Any) -> dict[str, Any]:
    write_yaml(folder / "predict.yaml", block, **shape)
    return read_config_values(folder)


def test_yaml_is_the_config_of_a_directory_without_one(tmp_path):
    found = ModelConfig.from_hf(says(tmp_path))
    assert found == ModelConfig.from_hf({**CONFIG, "torch_dtype": "float32"})


def test_a_config_json_goes_before_a_yaml(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert says(tmp_path, num_layers=3) == CONFIG


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"hidden_size": 8192, "num_layers": 80, "num_heads": 64, "n_kv_heads": 8,
          "intermediate_size": None, "ffn_dim_multiplier": 1.3, "multiple_of": 256},
         {"intermediate_size": 28672}),
        ({"hidden_size": 4096, "intermediate_size": None}, {"intermediate_size": 11008}),
        ({"rms_norm_eps": None}, {"rms_norm_eps": 1e-5}),
        ({"n_kv_heads": "None"}, {"num_key_value_heads": 4}),
        ({"max_position_embedding": 64}, {"max_position_embeddings": 64}),
        ({"seq_length": None}, {"max_position_embeddings": 2048}),
        ({"eos_token_id": [2, 7]}, {"eos_token_ids": (2, 7)}),
        ({"theta": 5e5}, {"rope_theta": 5e5}),
        ({"compute_dtype": None}, {"dtype": "float16"}),
        ({"qkv_has_bias": True}, {"architecture": "Qwen2ForCausalLM"}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    ],
)  # fmt: skip
def test_keys_and_defaults_of_theirs_are_taken(tmp_path, shape, expected):
    found = ModelConfig.from_hf(says(tmp_path, **shape))
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_layer": 2}, r"`model.model_config.num_layer` in .*predict.yaml is not a key; did you"),
        ({"hidden_size": "wide"}, r"`model.model_config.hidden_size`|hidden_size must be an integer"),
        ({"hidden_size": None}, "predict.yaml: hidden_size must be an integer"),
        ({"extend_method": "NTK"}, "extend_method` in .* must be 'None', or 'LLAMA3'"),
        ({"pet_config": {"pet_type": "lora"}}, "pet_config` in .* must be absent"),
        ({"moe_config": {"expert_num": 8}}, "mixtures of experts"),
        ({"ffn_dim_multiplier": float("nan"), "intermediate_size": None}, "ffn_dim_multiplier"),
        ({"multiple_of": 0, "intermediate_size": None}, "multiple_of"),
        ({"compute_dtype": "int8"}, "torch_dtype must be one of"),
        ({"eos_token_id": -1}, "eos_token_id must be a token id"),
        ({"block": {"quant_method": "rtn", "weight_dtype": "int-8"}}, "quantization_config: .*int-8"),
        ({"block": {"quant_method": "rtn", "weights": "int8"}}, "quantization_config.weights` in .*not"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_with_the_files_name(tmp_path, shape, message):
    with pytest.raises((CheckpointError, ModelError), match=message) as error:
        ModelConfig.from_hf(says(tmp_path, **shape), str(tmp_path / "predict.yaml"))
    assert "predict.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_scheme_is_that_of_the_same_file_on_the_command_line(tmp_path):
    """Theirs has other granularities where a file is silent."""
    block = {
        "quant_method": "ptq", "weight_dtype": "int8", "activation_dtype": "int8",
        "kvcache_dtype": "int8", "outliers_suppression": "smooth", "group_size": 0,
        "modules_to_not_convert": ["lm_head", "w2"], "algorithm_args": {},
    }  # fmt: skip
    path = write_yaml(tmp_path / "predict.yaml", block)
    values = read_config_file(path)
    given = {key[6:]: value for key, value in values.items() if key.startswith("quant.")}
    scheme = read_model_file(path).scheme
    assert scheme == QuantScheme.from_dict(given)
    assert (scheme.act_quant_granularity, scheme.kv_granularity) == ("per_tensor", "per_channel")
    assert read_model_file(write_yaml(path)).scheme is None


def is_accepted(method: str, weight: str, act: str, cache: str, suppression: str) -> bool:
    """The table of docs/golden_stick.md's methods: what each has a meaning for."""
    if weight == "None":
        return (act, cache, suppression) == ("None", "int8", "None") and method != "smooth_quant"
    if method == "smooth_quant":
        return (act, suppression) == ("int8", "smooth")
    return method == "ptq" or suppression == "None"


def test_of_the_48_cells_of_their_table_16_mean_something(tmp_path):
    found = {}
    values = (["rtn", "smooth_quant", "ptq"], *[["None", "int8"]] * 3, ["None", "smooth"])
    for method, *cell in itertools.product(*values):
        fields = ("weight_dtype", "activation_dtype", "kvcache_dtype", "outliers_suppression")
        block = {"quant_method": method, **dict(zip(fields, cell, strict=True))}
        path = write_yaml(tmp_path / "predict.yaml", {**block, "modules_to_not_convert": []})
        try:
            found[method, *cell] = read_model_file(path).scheme is not None
        except CheckpointError:
            found[method, *cell] = False
    assert len(found) == 48
    assert found == {cell: is_accepted(*cell) for cell in found}
    assert sum(found.values()) == 16


def test_several_yaml_files_are_refused_by_name(tmp_path):
    write_yaml(tmp_path / "a.yaml")
    write_yaml(tmp_path / "b.yml")
    with pytest.raises(CheckpointError, match=r"one YAML file.* but holds a.yaml, b.yml; leave"):
        read_config_values(tmp_path)


def test_a_directory_with_neither_is_told_of_config_json(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_config_values(tmp_path)


BOMB = "".join(
    f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9 if n else ['x'] * 9)}]\n" for n in range(12)
)
MERGES = "k0: &k0 {x: 1}\n" + "".join(
    f"k{n}: &k{n} {{<<: [{', '.join([f'*k{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)
UNREADABLE = {
    "aliases that multiply": (BOMB, f"stand for more than {MOST_VALUES:,} values"),
    "merges that multiply": (MERGES, f"stand for more than {MOST_VALUES:,} values"),
    "alias of itself": ("a: &a [*a]\n", "alias for what the alias stands in"),
    "deep": ("- " * 20000, "nests too deeply"),
    "not YAML": ("model: [1\n", "not readable YAML"),
    "no such day": ("day: 2024-02-31\n", "not readable YAML"),
    "long number": (f"n: {'9' * 5000}\n", "not readable YAML"),
    "object of Python": ("a: !!python/object:os.system []\n", "not readable YAML"),
    "two documents": ("a: 1\n---\nb: 2\n", "not readable YAML"),
    "a list": ("- 1\n", "must be a mapping of keys, but holds a list"),
    "nothing": ("", "must be a mapping of keys, but holds nothing"),
    "numbers as keys": ("1: 2\n", "the key 1, which is not a string"),
    "other YAML": ("a: 1\n", "`model.model_config` in .* must say the model's shape"),
    "no mapping": ("model: 7\n", "`model` in .* must be a mapping"),
    "long": ("# " + "x" * (256 << 10), "at most 262,144 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("fault", UNREADABLE)
def test_unreadable_yaml_is_refused_in_a_sentence(tmp_path, fault):
    text, message = UNREADABLE[fault]
    path = tmp_path / "predict.yaml"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        read_model_file(path)
    assert len(str(error.value)) < 500


def test_a_bomb_on_the_command_line_is_refused_too(tmp_path):
    (tmp_path / "bomb.yaml").write_text(BOMB)
    with pytest.raises(ConfigError, match=r"is not YAML .*stand for more than"):
        read_config_file(tmp_path / "bomb.yaml")


def test_aliases_of_theirs_are_read():
    text = "eval_dataset: &eval {type: x}\ntask: {dataset: *eval}\nmore: {<<: *eval, y: 1}\n"
    assert parse_yaml(text) == yaml.safe_load(text)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "predict.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="not readable YAML"):
        read_yaml_mapping(tmp_path / "predict.yaml")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture
def described(original, tmp_path):
    """The same weights and tokenizer, with a YAML for the config.json."""
    path = Path(shutil.copytree(original, tmp_path / "yaml"))
    (path / "config.json").unlink()
    write_yaml(path / "predict_llama2.yaml")
    return path


def test_yaml_and_safetensors_give_the_text_of_the_same_checkpoint(original, described):
    prompts = [[1, 7, 99], [1, 5]]
    assert generate(described, prompts, 2) == generate(original, prompts, 1)


def test_a_prepared_directory_has_a_config_json_made_from_the_yaml(original, described, tmp_path):
    prepared = prepare(described, tmp_path / "tp2", 2, RTN)
    values = json.loads((prepared / "config.json").read_text())
    assert values == read_config_values(described)
    assert open_checkpoint(prepared).config == open_checkpoint(described).config
    assert generate(prepared, [[1, 7]], 2) == generate(original, [[1, 7]], 1, scheme=RTN)


def test_yaml_and_one_ckpt_give_the_text_of_the_same_checkpoint(original, tmp_path):
    weights = load_file(original / "model.safetensors")
    write_ckpt(tmp_path / "llama.ckpt", {their_name(name): at for name, at in weights.items()})
    write_yaml(tmp_path / "predict_llama2.yaml")
    assert generate(tmp_path, [[1, 7, 99]], 2) == generate(original, [[1, 7, 99]], 1)
