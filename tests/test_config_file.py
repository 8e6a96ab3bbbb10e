"""config=FILE: shardrun's own YAML, and the predict YAML files of MindFormers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launcher.config import compose
from launcher.config_file import read_config_file
from launcher.environment.detection import detect
from launcher.environment.size import decide_size
from launcher.failures import ConfigError, LaunchError
from launcher.host.device import resolve_dtype
from launcher.resolve import check_generation
from launcher.schema import Config, model_overrides, to_yaml
from parallel.model.config import ModelConfig
from quant.errors import QuantError

# The form of their predict files, a 13B, with one entry of each kind of key that they carry.
PREDICT = """
seed: 0
output_dir: './output' # path to save checkpoint/strategy
load_checkpoint: ''
src_strategy_path_or_dir: ''
auto_trans_ckpt: True
only_save_strategy: False
resume_training: False
run_mode: 'predict'

trainer:
  type: CausalLanguageModelingTrainer
  model_name: 'llama2_13b'

runner_config:
  epochs: 2
  batch_size: 1

eval_dataset: &eval_dataset
  data_loader: {type: MindDataset, dataset_dir: ""}
eval_dataset_task:
  dataset_config: *eval_dataset

use_parallel: False
parallel:
  parallel_mode: 1
  full_batch: True
parallel_config:
  data_parallel: 1
  model_parallel: 2
  pipeline_stage: 1
  micro_batch_num: 16
  vocab_emb_dp: False
moe_config:
  expert_num: 1
callbacks:
  - type: MFLossMonitor

context:
  mode: 0
  device_target: "Ascend"
  max_device_memory: "58GB"
  ascend_config:
    precision_mode: "must_keep_origin_dtype"

model:
  model_config:
    type: LlamaConfig
    batch_size: 1
    seq_length: 4096
    hidden_size: 5120
    num_layers: 40
    num_heads: 40
    max_position_embedding: 4096
    vocab_size: 32000
    multiple_of: 256
    rms_norm_eps: 1.0e-5
    bos_token_id: 1
    eos_token_id: 2
    pad_token_id: 0
    ignore_token_id: -100
    compute_dtype: "float16"
    param_init_type: "float16"
    softmax_compute_type: "float16"
    use_past: True
    scaling_factor: 1.0
    extend_method: "None"
    use_flash_attention: True
    block_size: 16
    num_blocks: 512
    qkv_concat: True
    checkpoint_name_or_path: ""
    repetition_penalty: 1
    max_decode_length: 512
    top_k: 3
    top_p: 1
    do_sample: False
  arch:
    type: LlamaForCausalLM

processor:
  return_tensors: ms
  tokenizer:
    type: LlamaTokenizer
    vocab_file: ""
  type: LlamaProcessor

metric:
  type: EmF1Metric
profile: False
profile_start_step: 1
"""
RTN = """
quant_method: 'rtn'
weight_dtype: 'int8'
activation_dtype: None
kvcache_dtype: None
outliers_suppression: None
modules_to_not_convert: ['lm_head']
algorithm_args: {}
"""
SMOOTH_QUANT = """
quant_method: 'smooth_quant'
weight_dtype: 'int8'
activation_dtype: 'int8'
kvcache_dtype: None
outliers_suppression: 'smooth'
modules_to_not_convert: ['lm_head', 'w2']
algorithm_args: {}
"""
PTQ = """
quant_method: 'ptq'
weight_dtype: 'int8'
activation_dtype: 'int8'
kvcache_dtype: 'int8'
outliers_suppression: 'smooth'
modules_to_not_convert: ['lm_head', 'w2']
algorithm_args: {}
"""


def write(directory: Path, values: Any) -> Path:
    """A YAML file of values, or of text as it is."""
    path = directory / "config.yaml"
    text = values if isinstance(values, str) else yaml.safe_dump(values)
    path.write_text(text, encoding="utf-8")
    return path


def predict(directory: Path, quantization: str = "", model: Any = None, **top: Any) -> Path:
    """A predict file with other values in model.model_config and at the top level."""
    values = yaml.safe_load(PREDICT)
    values["model"]["model_config"] |= model or {}
    if quantization:
        values["model"]["model_config"]["quantization_config"] = yaml.safe_load(quantization)
    for key, value in top.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return write(directory, values)


def read(path: Path) -> dict[str, Any]:
    return read_config_file(path)


def notes(path: Path, *words: str) -> list[str]:
    """What is said of a file."""
    said: list[str] = []
    compose([f"config={path}", *words], say=said.append)
    return said


def refusal(path: Path) -> str:
    """The sentence that a file is refused with, with or without a command line around it."""
    with pytest.raises(ConfigError) as caught:
        compose([f"config={path}"])
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))
    return sentence


# ---------------------------------------------------------------------------------- shardrun's own


def test_a_run_yaml_composes_to_the_configuration_it_was_written_from(tmp_path: Path) -> None:
    written = compose(
        [
            "task=prepare",
            "quant=rtn_a16w8",
            "quant.algorithm_args={}",
            "quant.modules_to_not_convert=[lm_head,'*.down_proj']",
            "quant.layer_policies=[{pattern:'*.0.*',weight_dtype:null},{pattern:wo,group_size:32}]",
            "parallel.tp=4",
            "prompts=['one, two','${x} = 3']",
            "model.rope_scaling={rope_type:linear,factor:2.0}",
            "verify.original=/data/a=b (1)",
            "generation.stop=[END]",
        ]
    )
    path = write(tmp_path, to_yaml(written))
    assert compose([f"config={path}"]) == dataclasses.replace(written, config=str(path))


def test_a_run_yaml_may_name_the_file_it_came_from(tmp_path: Path) -> None:
    path = write(tmp_path, to_yaml(Config(config="gone.yaml")))
    assert compose([f"config={path}"]).config == str(path)


def test_nested_and_dotted_keys_mean_the_same(tmp_path: Path) -> None:
    nested = read(
        write(tmp_path, {"parallel": {"tp": 2}, "generation": {"seed": 3}, "dtype": "auto"})
    )
    dotted = read(write(tmp_path, {"parallel.tp": 2, "generation.seed": 3, "dtype": "auto"}))
    assert nested == dotted == {"parallel.tp": 2, "generation.seed": 3, "dtype": "auto"}


def test_a_section_that_is_a_name_takes_a_preset(tmp_path: Path) -> None:
    path = write(tmp_path, {"quant": "rtn_a16w8", "quant.modules_to_not_convert": []})
    config = compose([f"config={path}"])
    assert (config.quant.weight_dtype, config.quant.modules_to_not_convert) == ("int8", [])


def test_an_empty_section_sets_nothing(tmp_path: Path) -> None:
    assert read(write(tmp_path, "generation:\nparallel: {}\n")) == {}


def test_a_mapping_that_is_a_value_stays_whole(tmp_path: Path) -> None:
    path = write(tmp_path, {"quant": {"algorithm_args": {"alpha": 0.5}}})
    assert read(path) == {"quant.algorithm_args": {"alpha": 0.5}}
    assert compose([f"config={path}"]).quant.algorithm_args == {"alpha": 0.5}


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {"task": {"name": "plan"}, "parallel": {"tp": 2}})
    config = compose(["task=prepare", f"config={path}", "parallel.tp=8"])
    assert (config.task.name, config.parallel.tp) == ("prepare", 8)


def test_the_home_directory_is_found_in_paths_and_left_in_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    values = read(write(tmp_path, {"checkpoint": "~/llama (1)", "prompt": "~/x"}))
    assert values == {"checkpoint": "/home/me/llama (1)", "prompt": "~/x"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "must be a mapping of keys, but holds nothing"),
        ("- parallel.tp\n", "must be a mapping of keys, but holds a list"),
        ("just words\n", "must be a mapping of keys, but holds a str"),
        ("1: 2\n", "holds the key 1, which is not a string"),
        ("parallel: {tp: 2\ndtype: auto\n", "is not YAML (line 2: "),
        ("a: !!python/object/apply:os.getcwd []\n", "is not YAML (line 1: could not determine"),
        ("a: 2024-02-31\n", "is not YAML (day is out of range"),
        ("a: 1\n---\nb: 2\n", "is not YAML (line 2: "),
        ("paralel: {tp: 2}\n", "`paralel.tp` is not a key; did you mean `parallel.tp`?"),
        ("parallel: {tp: two}\n", "`parallel.tp` must be an integer or null, but is 'two'"),
        ("parallel: 2\n", "`parallel` has no choice '2'"),
        ("quant: rtn_a16w9\n", "`quant` has no choice 'rtn_a16w9'; did you mean rtn_a16w8?"),
        ("parallel: {tp: 2}\nparallel.tp: 4\n", "`parallel.tp` is set twice"),
        ("prompt: no\n", "`prompt` in {path} must be a string, but is False"),
        ("checkpoint: 13\n", "`checkpoint` in {path} must be a string, but is 13"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = write(tmp_path, text)
    assert sentence.replace("{path}", str(path)) in refusal(path)


def test_a_file_that_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "gone.yaml")
    assert "must be a regular file" in refusal(tmp_path)
    binary = tmp_path / "weights.bin"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    assert "is not YAML" in refusal(binary)


# ------------------------------------------------------------------------------------- MindFormers


def test_the_shipped_rtn_form_becomes_these_keys(tmp_path: Path) -> None:
    assert read(predict(tmp_path, RTN)) == {
        "parallel.vocab_emb_dp": False,
        "model.hidden_size": 5120,
        "model.num_hidden_layers": 40,
        "model.num_attention_heads": 40,
        "model.max_position_embeddings": 4096,
        "model.vocab_size": 32000,
        "model.rms_norm_eps": 1e-5,
        "model.torch_dtype": "float16",
        "model.architectures": ["LlamaForCausalLM"],
        "model.intermediate_size": 13824,
        "generation.repetition_penalty": 1,
        "generation.do_sample": False,
        "generation.max_length": 512,
        "generation.seed": 0,
        "quant.quant_method": "rtn",
        "quant.weight_dtype": "int8",
        "quant.activation_dtype": None,
        "quant.kvcache_dtype": None,
        "quant.outliers_suppression": None,
        "quant.modules_to_not_convert": ["lm_head"],
        "quant.algorithm_args": {},
    }


def test_the_shipped_rtn_form_composes_to_the_rtn_preset(tmp_path: Path) -> None:
    config = compose([f"config={predict(tmp_path, RTN)}"])
    assert config.quant.scheme() == compose(["quant=rtn_a16w8"]).quant.scheme()
    assert config.parallel.tp is None
    check_generation(config.generation)


@pytest.mark.parametrize("form", [SMOOTH_QUANT, PTQ], ids=["smooth_quant", "ptq"])
def test_the_other_shipped_forms_reach_the_scheme_whole(tmp_path: Path, form: str) -> None:
    config = compose([f"config={predict(tmp_path, form)}"])
    given = {key: None if value == "None" else value for key, value in yaml.safe_load(form).items()}
    assert {key: getattr(config.quant, key) for key in given} == given
    assert config.quant.scheme().needs_calibration


def test_their_default_granularities_are_written_out(tmp_path: Path) -> None:
    values = read(predict(tmp_path, PTQ))
    assert values["quant.act_quant_granularity"] == "per_tensor"
    assert values["quant.kvcache_quant_granularity"] == "per_channel"
    given = read(predict(tmp_path, PTQ + "act_quant_granularity: per_token\ngroup_size: 0\n"))
    assert given["quant.act_quant_granularity"] == "per_token"
    assert given["quant.group_size"] is None


@pytest.mark.parametrize("none", ["None", "none", "'None'", "null", "''"])
def test_their_spellings_of_none_are_null(tmp_path: Path, none: str) -> None:
    text = "quant_method: rtn\nweight_dtype: int8\nactivation_dtype: NONE\nkvcache_dtype: NONE\n"
    text += "precision_recovery: NONE\nalgorithm_args: NONE\nmodules_to_not_convert: NONE\n"
    config = compose([f"config={predict(tmp_path, text.replace('NONE', none))}"])
    assert (config.quant.activation_dtype, config.quant.algorithm_args) == (None, {})
    assert config.quant.scheme().modules_to_not_convert == ()


def test_words_are_taken_in_any_case(tmp_path: Path) -> None:
    text = PTQ.replace("'ptq'", "PTQ").replace("'int8'", "Int8").replace("'smooth'", "Smooth")
    text += "kvcache_quant_granularity: Per_Channel\n"
    text += "layer_policies: [{pattern: wo, weight_dtype: INT8}]\n"
    config = compose([f"config={predict(tmp_path, text)}"])
    lower = compose([f"config={predict(tmp_path, text.lower())}"])
    assert config.quant.scheme() == lower.quant.scheme()
    assert (config.quant.quant_method, config.quant.weight_dtype) == ("ptq", "int8")


@pytest.mark.parametrize(
    ("word", "lower"),
    [
        ("quant=RTN_A16W8", "quant=rtn_a16w8"),
        ("quant=Smooth_Quant", "quant=smooth_quant"),
        ("quant.quant_method=RTN", "quant.quant_method=rtn"),
        ("quant.act_quant_granularity=Per_Tensor", "quant.act_quant_granularity=per_tensor"),
        ("dtype=Float16", "dtype=float16"),
        ("device=CPU", "device=cpu"),
        ("model.torch_dtype=BFloat16", "model.torch_dtype=bfloat16"),
    ],
)
def test_words_of_the_command_line_and_of_our_files_are_taken_in_any_case(
    tmp_path: Path, word: str, lower: str
) -> None:
    assert compose([word]) == compose([lower])
    key, _, value = word.partition("=")
    path = write(tmp_path, {key: value})
    assert compose([f"config={path}"]) == dataclasses.replace(compose([lower]), config=str(path))


def test_a_word_that_is_none_is_refused_in_any_case() -> None:
    with pytest.raises(
        ConfigError, match="`quant` has no choice 'rtn_a16w9'; did you mean rtn_a16w8"
    ):
        compose(["quant=RTN_A16W9"])
    with pytest.raises(QuantError, match="is 'rtm'; did you mean rtn"):
        compose(["quant.quant_method=RTM"]).quant.scheme()


def test_a_module_that_is_none_is_told_both_names_of_those_that_are(tmp_path: Path) -> None:
    config = compose([f"config={predict(tmp_path, RTN.replace('lm_head', 'w4'))}"])
    modules = [f"model.layers.0.{name}" for name in ("mlp.down_proj", "self_attn.o_proj")]
    with pytest.raises(QuantError, match=r"or one of down_proj \(w2\), lm_head, o_proj \(wo\)"):
        config.quant.scheme().left_out(["lm_head", *modules])


def test_a_mistyped_quant_dtype_is_refused_by_the_scheme(tmp_path: Path) -> None:
    config = compose([f"config={predict(tmp_path, RTN.replace('int8', 'int-8'))}"])
    with pytest.raises(QuantError, match=r"is 'int-8'; did you mean int8\?"):
        config.quant.scheme()


def test_their_module_names_are_known_to_the_scheme(tmp_path: Path) -> None:
    config = compose([f"config={predict(tmp_path, RTN.replace('lm_head', 'w2'))}"])
    modules = ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]
    assert config.quant.scheme().left_out(modules) == {"model.layers.0.mlp.down_proj"}


def test_a_file_without_quantization_config_leaves_quant_alone(tmp_path: Path) -> None:
    assert not any(key.startswith("quant") for key in read(predict(tmp_path)))
    assert compose([f"config={predict(tmp_path)}"]).quant.scheme().quant_method is None


def test_the_70b_form_is_the_published_shape(tmp_path: Path) -> None:
    shape = {
        "hidden_size": 8192,
        "num_layers": 80,
        "num_heads": 64,
        "n_kv_heads": 8,
        "ffn_dim_multiplier": 1.3,
    }
    path = predict(
        tmp_path,
        model=shape,
        use_parallel=True,
        parallel_config={"model_parallel": 8, "vocab_emb_dp": True},
    )
    config = compose([f"config={path}"])
    preset = compose(["model=llama2_70b"])
    shapes = [ModelConfig.from_hf(model_overrides(item)) for item in (config, preset)]
    # The preset leaves the end of an answer to the checkpoint.
    assert dataclasses.replace(shapes[0], eos_token_ids=()) == shapes[1]
    assert (config.parallel.tp, config.parallel.vocab_emb_dp) == (8, True)


@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ({"hidden_size": 4096}, 11008),
        ({"hidden_size": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),
        ({"intermediate_size": 18944}, 18944),
    ],
)
def test_the_ffn_is_as_wide_as_theirs(tmp_path: Path, shape: dict[str, Any], width: int) -> None:
    assert read(predict(tmp_path, model=shape))["model.intermediate_size"] == width


def test_without_multiple_of_the_checkpoint_says_how_wide_the_ffn_is(tmp_path: Path) -> None:
    assert "model.intermediate_size" not in read(predict(tmp_path, model={"multiple_of": None}))


def test_biases_of_q_k_and_v_make_their_llama_a_qwen2(tmp_path: Path) -> None:
    values = read(predict(tmp_path, model={"qkv_has_bias": True}))
    assert values["model.architectures"] == ["Qwen2ForCausalLM"]


def test_the_rotary_scaling_of_llama3_is_carried_over(tmp_path: Path) -> None:
    numbers = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = {"extend_method": "LLAMA3", "scaling_factor": numbers, "theta": 500000}
    config = compose([f"config={predict(tmp_path, model=model)}"])
    preset = compose(["model=llama3_8b"])
    assert config.model.rope_scaling == preset.model.rope_scaling
    assert config.model.rope_theta == preset.model.rope_theta


def test_sampling_keys_are_used_with_do_sample_only(tmp_path: Path) -> None:
    greedy = read(predict(tmp_path))
    assert {"generation.top_k", "generation.top_p"}.isdisjoint(greedy)
    assert "  do_sample is not True: top_k=3, top_p=1" in notes(predict(tmp_path))
    sampled = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.05}
    config = compose([f"config={predict(tmp_path, model=sampled)}"])
    generation = config.generation
    assert (generation.top_k, generation.top_p, generation.temperature) == (3, 1.0, 0.7)
    assert generation.repetition_penalty == 1.05


def test_max_new_tokens_goes_before_max_decode_length_as_theirs_does(tmp_path: Path) -> None:
    values = read(predict(tmp_path, model={"max_new_tokens": 20}))
    assert values["generation.max_new_tokens"] == 20
    assert "generation.max_length" not in values


def test_a_batch_is_so_many_sequences_at_once(tmp_path: Path) -> None:
    assert "generation.max_num_seqs" not in read(predict(tmp_path))
    assert read(predict(tmp_path, model={"batch_size": 4}))["generation.max_num_seqs"] == 4


def test_model_parallel_counts_where_use_parallel_is_true(tmp_path: Path) -> None:
    assert read(predict(tmp_path, use_parallel=True))["parallel.tp"] == 2
    assert "parallel.tp" not in read(predict(tmp_path, use_parallel=False))


@pytest.mark.parametrize("key", ["data_parallel", "pipeline_stage"])
def test_other_parallelism_is_set_aside_as_by_their_predict_script(
    tmp_path: Path, key: str
) -> None:
    path = predict(tmp_path, use_parallel=True, parallel_config={key: 8})
    assert read(path)["parallel.tp"] == 2
    line = f"  model_parallel ranks are run, one replica of one stage: parallel_config.{key}=8"
    assert line in notes(path)
    ones = predict(tmp_path, use_parallel=True, parallel_config={key: 1})
    assert not any(key in note for note in notes(ones))


CLAIMS = {
    "msrun": (
        {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4", "RANK_ID": "0", "MS_SCHED_HOST": "h",
         "MS_SCHED_PORT": "9"},
        "mindspore's number of ranks",
    ),
    "torchrun": (
        {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "9"},
        "torchrun's number of ranks",
    ),
    "srun": (
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1"},
        "slurm's number of ranks",
    ),
    "mpirun": (
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"},
        "openmpi's number of ranks",
    ),
    "hand-set": ({"MS_WORKER_NUM": "4"}, "MS_WORKER_NUM"),
}  # fmt: skip


@pytest.mark.parametrize("launcher", CLAIMS)
@pytest.mark.parametrize("task", ["generate", "prepare"])
def test_the_launchers_size_goes_before_model_parallel(
    tmp_path: Path, launcher: str, task: str
) -> None:
    """As their guide says: it will override config.model_parallel."""
    variables, name = CLAIMS[launcher]
    environment = detect(variables)
    for size in (1, 8):
        path = predict(tmp_path, use_parallel=True, parallel_config={"model_parallel": size})
        said: list[str] = []
        config = compose([f"task={task}", f"config={path}"], environment.claim, said.append)
        assert decide_size(environment, config.parallel.tp, 16, 1)[0] == 4
        assert f"  {name} is 4, and goes before it: parallel_config.model_parallel={size}" in said
    # What the user types is no YAML's, and neither is a run.yaml.
    typed = compose([f"config={path}", "parallel.tp=8"], environment.claim)
    ours = compose([f"config={write(tmp_path, {'parallel.tp': 8})}"], environment.claim)
    for config in (typed, ours):
        with pytest.raises(LaunchError, match=f"{name}=4, parallel.tp=8"):
            decide_size(environment, config.parallel.tp, 16, 1)


def test_without_a_launcher_model_parallel_is_asked_for_of_a_prepared_checkpoint_too(
    tmp_path: Path,
) -> None:
    path = predict(tmp_path, use_parallel=True)
    config = compose([f"config={path}"], detect({}).claim)
    assert decide_size(detect({}), config.parallel.tp, 8, 1) == (2, ())


def test_compute_dtype_is_the_models_dtype_and_leaves_ours_open(tmp_path: Path) -> None:
    """float16 on a CPU becomes what the CPU multiplies, as with dtype=auto."""
    config = compose([f"config={predict(tmp_path, model={'compute_dtype': 'BFloat16'})}"])
    assert (config.dtype, config.model.torch_dtype) == ("auto", "bfloat16")
    model = ModelConfig.from_hf(model_overrides(config))
    assert resolve_dtype(config.dtype, model.dtype, torch.device("cpu")) == torch.bfloat16
    config = compose([f"config={predict(tmp_path)}"])
    model = ModelConfig.from_hf(model_overrides(config))
    assert resolve_dtype(config.dtype, model.dtype, torch.device("cuda", 0)) == torch.float16
    on_cpu = resolve_dtype(config.dtype, model.dtype, torch.device("cpu"))
    assert on_cpu in (torch.bfloat16, torch.float32)
    forced = compose([f"config={predict(tmp_path)}", "dtype=float16"])
    assert resolve_dtype(forced.dtype, model.dtype, torch.device("cpu")) == torch.float16


@pytest.mark.parametrize(
    ("target", "device"),
    [("CPU", "cpu"), ("GPU", "cuda"), ("Ascend", "auto"), ("ASCEND", "auto"), ("gpu", "cuda")],
)
def test_device_target_is_the_device(tmp_path: Path, target: str, device: str) -> None:
    path = predict(tmp_path, context={"device_target": target})
    assert compose([f"config={path}"]).device == device


@pytest.mark.parametrize(
    ("name", "model", "checkpoint"),
    [
        ({}, {}, None),
        ({"load_checkpoint": "/data/13b"}, {}, "/data/13b"),
        ({"load_checkpoint": "None"}, {}, None),
        ({"pretrained_model_dir": "/data/hf"}, {}, "/data/hf"),
        ({}, {"checkpoint_name_or_path": "./13b.ckpt"}, "./13b.ckpt"),
        ({}, {"checkpoint_name_or_path": "llama2_13b"}, None),
        ({"load_checkpoint": "/a"}, {"checkpoint_name_or_path": "/b/c"}, "/a"),
    ],
)
def test_load_checkpoint_or_what_stands_in_for_it_is_the_checkpoint(
    tmp_path: Path, name: dict[str, str], model: dict[str, str], checkpoint: str | None
) -> None:
    assert read(predict(tmp_path, model=model, **name)).get("checkpoint") == checkpoint


def test_every_key_is_used_or_named_once_a_line_for_each_reason(tmp_path: Path) -> None:
    path = predict(
        tmp_path,
        RTN,
        {"checkpoint_name_or_path": "llama2_13b", "seq_length": 4096},
        processor={"tokenizer": {"vocab_file": "tokenizer.model"}},
        my_section={"x": 1},
    )
    lines = notes(path)
    said = "\n".join(lines)
    assert lines[0] == f"{path} (MindFormers) has keys that are not used:"
    assert len({line.partition(":")[0] for line in lines}) == len(lines)
    values = yaml.safe_load(path.read_text())
    for key in values:
        used = key in ("load_checkpoint", "seed", "use_parallel", "model", "context")
        blank = values[key] == ""
        assert used or blank or key in said, key
    names = values["model"]["model_config"].keys() - USED_MODEL_KEYS
    assert [name for name in names if name not in said] == []
    for phrase in (
        "  device=auto is used instead: context.device_target=Ascend",
        "  there are no weights: processor.tokenizer.vocab_file=tokenizer.model",
        "  use_parallel is not True, so parallel.tp is open: parallel_config.data_parallel=1, "
        "parallel_config.model_parallel=2",
        "  not known: my_section",
        "  the KV cache is sized by the prompts and answers: block_size=16, num_blocks=512, seq_length",
    ):
        assert phrase in said


USED_MODEL_KEYS = {
    "hidden_size",
    "num_layers",
    "num_heads",
    "max_position_embedding",
    "vocab_size",
    "multiple_of",
    "rms_norm_eps",
    "compute_dtype",
    # The shape has no weights, which could say the rest of a config.json.
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "repetition_penalty",
    "max_decode_length",
    "do_sample",
    "quantization_config",
    # They say nothing: "None" and 1.0.
    "extend_method",
    "scaling_factor",
}


@pytest.mark.parametrize(
    ("model", "top", "sentence"),
    [
        (
            {"num_layer": 40},
            {},
            "`model.model_config.num_layer` in {path} is not a key; did you mean",
        ),
        ({"zzz": 1}, {}, "`model.model_config.zzz` in {path} is not a key; remove it."),
        ({"extend_method": "NTK"}, {}, "extend_method` in {path} must be 'None', or 'LLAMA3'"),
        (
            {"scaling_factor": 2.0},
            {},
            "scaling_factor` in {path} must be 1.0 without an extend_method",
        ),
        ({"pet_config": {"pet_type": "slora"}}, {}, "pet_config` in {path} must be absent"),
        ({"quant": "w8a16"}, {}, "write a quantization_config."),
        ({"moe_config": {"expert_num": 8}}, {}, "mixtures of experts are not run"),
        ({}, {"moe_config": {"expert_num": 8}}, "`moe_config` in {path} must be absent"),
        ({"batch_size": 0}, {}, "batch_size` in {path} must be a positive integer, but is 0"),
        ({"multiple_of": "x"}, {}, "multiple_of` in {path} must be a positive integer, but is 'x'"),
        ({"ffn_dim_multiplier": -1}, {}, "ffn_dim_multiplier` in {path} must be a positive number"),
        ({"hidden_size": True}, {}, "hidden_size` in {path} must be a positive integer"),
        ({"num_heads": "many"}, {}, "`model.num_attention_heads` must be an integer or null"),
        (
            {},
            {"context": {"device_target": "TPU"}},
            "must be one of Ascend, GPU, CPU, but is 'TPU'",
        ),
        ({}, {"context": "Ascend"}, "`context` in {path} must be a mapping, but is 'Ascend'"),
        ({}, {"load_checkpoint": 13}, "`checkpoint` in {path} must be a string, but is 13"),
        (
            {},
            {"quant": "rtn_a16w8"},
            "`quant` is no key of MindFormers, as {path} is; write quant=…",
        ),
        ({}, {"parallel.tp": 2}, "`parallel.tp` is no key of MindFormers"),
    ],
)
def test_what_would_change_the_text_is_refused(
    tmp_path: Path, model: dict[str, Any], top: dict[str, Any], sentence: str
) -> None:
    path = predict(tmp_path, model=model, **top)
    assert sentence.replace("{path}", str(path)) in refusal(path)


def test_an_unknown_quantization_key_is_refused_with_the_nearest(tmp_path: Path) -> None:
    path = predict(tmp_path, RTN.replace("weight_dtype", "weights_dtype"))
    assert "quantization_config.weights_dtype" in refusal(path)
    assert refusal(path).endswith("did you mean `weight_dtype`?")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = predict(tmp_path)
    path.write_text(
        path.read_text().replace("LlamaForCausalLM", "ChatGLM2ForConditionalGeneration")
    )
    assert "`model.arch.type` in" in refusal(path)


@pytest.mark.parametrize(
    "text",
    [
        "load_checkpoint: ''\n",
        "use_parallel: True\n",
        "model: {model_config: {hidden_size: 64}}\n",
        "context: {device_target: CPU}\n",
    ],
)
def test_a_part_of_a_predict_file_is_known_for_one(tmp_path: Path, text: str) -> None:
    config = compose([f"config={write(tmp_path, text)}"])
    assert config.quant.quant_method is None


def test_the_command_line_overrides_a_predict_file(tmp_path: Path) -> None:
    path = predict(tmp_path, RTN, use_parallel=True, load_checkpoint="/a")
    config = compose([f"config={path}", "parallel.tp=4", "checkpoint=/b", "dtype=float32"])
    assert (config.parallel.tp, config.checkpoint, config.dtype) == (4, "/b", "float32")
