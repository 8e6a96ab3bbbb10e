"""MindFormers' YAML and bare weights: what it says stands for the files that are not beside them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from launcher.config import compose
from launcher.environment.worker import WorkerEnvironment
from launcher.failures import ConfigError
from launcher.resolve import Resolved, make_job, open_job, resolve
from launcher.schema import Config, from_yaml, to_yaml
from launcher.tasks.export import run as export
from launcher.tasks.plan.run import run as plan
from launcher.tasks.prepare.run import run as prepare
from launcher.text import open_tokenizer
from parallel.checkpoint.open import open_checkpoint
from parallel.errors import CheckpointError
from quant.scheme import QuantScheme
from tests.checkpoints import CONFIG, DEMO, write_checkpoint
from tests.golden_stick import rtn_06, their_tensors
from tests.mindspore_checkpoints import rank_weights, to_mindformers, write_ckpt
from tests.models import RTN
from tests.test_model_files import RTN_BLOCK, write_yaml
from tests.test_prepared import merged
from tests.test_prepared import prepare as prepared_by

PLAIN = WorkerEnvironment()
WHOLE = ("model.tok_embeddings.embedding_weight", "lm_head.weight")
PTQ_BLOCK = {**RTN_BLOCK, "quant_method": "ptq", "activation_dtype": "int8"}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "hf", dtype=torch.float16)


@pytest.fixture
def weights(original) -> dict[str, torch.Tensor]:
    return to_mindformers(load_file(original / "model.safetensors"))


@pytest.fixture
def given(tmp_path) -> Path:
    """The YAML of CONFIG_PATH, with its tokenizer beside it."""
    folder = tmp_path / "configs"
    folder.mkdir()
    shutil.copyfile(DEMO / "tokenizer.model", folder / "spm.model")
    shape = {"compute_dtype": "float16", "max_decode_length": 24}
    return with_tokenizer(write_yaml(folder / "predict_llama2.yaml", **shape))


def with_tokenizer(path: Path, name: str = "spm.model", key: str = "vocab_file") -> Path:
    values = yaml.safe_load(path.read_text())
    values["processor"] = {"tokenizer": {"type": "LlamaTokenizer", key: name}}
    path.write_text(yaml.safe_dump(values))
    return path


def one_file(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    return write_ckpt(folder / "llama.ckpt", weights)


def one_directory(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    return one_file(folder, weights).parent


def two_ranks(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    for rank in range(2):
        write_ckpt(folder / f"rank_{rank}" / "x.ckpt", rank_weights(weights, rank, 2, 2, WHOLE))
    return folder


def file_of_one_rank(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    return write_ckpt(folder / "rank_0" / "x.ckpt", weights)


FORMS = {
    "the file": one_file,
    "its directory": one_directory,
    "a directory with rank_0 and rank_1": two_ranks,
    "the file of the only rank": file_of_one_rank,
    "the directory of the only rank": lambda *how: file_of_one_rank(*how).parent,
    "the file of the first rank": lambda *how: two_ranks(*how) / "rank_0" / "x.ckpt",
}


def composed(*words: str) -> tuple[Config, str]:
    said: list[str] = []
    config = compose(list(words), say=said.append)
    return config, "\n".join(said)


def resolved(*words: str) -> Resolved:
    return resolve(compose(list(words)), PLAIN)


# --------------------------------------------------------------------- the model and the tokenizer


@pytest.mark.parametrize("form", FORMS)
def test_the_yaml_supplies_the_shape_and_the_tokenizer(form, original, weights, given, tmp_path):
    path = FORMS[form](tmp_path / "w", weights)
    prompts = "prompts=[Once upon,x]"
    job, _ = make_job(compose([f"config={given}", f"checkpoint={path}", prompts]), PLAIN)
    expected, _ = make_job(compose([f"checkpoint={original}", prompts]), PLAIN)
    ids, expected_ids = ([item.token_ids for item in made.prompts] for made in (job, expected))
    assert ids == expected_ids
    # A rank knows of it what run.yaml says.
    found = open_job(from_yaml(to_yaml(job.config)))
    wanted = open_checkpoint(original)
    assert found.config == wanted.config
    assert found.eos_token_ids == (2,)
    found.layout(QuantScheme())
    everything = (slice(0, 2048), slice(0, 64))
    head = found.source.read("lm_head.weight", everything)
    assert torch.equal(head, wanted.source.read("lm_head.weight", everything))


def test_the_yaml_means_beside_the_weights_what_it_means_elsewhere(weights, given, tmp_path):
    bare = one_directory(tmp_path / "bare", weights)
    beside = one_directory(tmp_path / "beside", weights)
    shutil.copyfile(given, beside / "predict.yaml")
    elsewhere = resolved(f"config={given}", f"checkpoint={bare}")
    assert elsewhere.checkpoint.config == resolved(f"checkpoint={beside}").checkpoint.config


def test_defaults_are_mindformers_where_the_yaml_is_silent(weights, tmp_path):
    yaml_file = write_yaml(tmp_path / "p.yaml", rms_norm_eps=None, eos_token_id=None)
    bare = one_directory(tmp_path / "bare", weights)
    found = resolved(f"config={yaml_file}", f"checkpoint={bare}").checkpoint
    assert (found.config.rms_norm_eps, found.eos_token_ids) == (1e-5, (2,))


def test_defaults_do_not_stand_in_for_a_config_json(original, tmp_path):
    path = Path(shutil.copytree(original, tmp_path / "hf"))
    values = json.loads((path / "config.json").read_text()) | {
        "rms_norm_eps": 1e-6,
        "eos_token_id": 7,
    }
    (path / "config.json").write_text(json.dumps(values))
    yaml_file = write_yaml(tmp_path / "p.yaml", rms_norm_eps=None)
    found = resolved(f"config={yaml_file}", f"checkpoint={path}").checkpoint
    assert (found.config.rms_norm_eps, found.eos_token_ids) == (1e-6, (7,))


def test_the_yaml_that_is_given_is_taken_where_several_lie_beside_the_weights(weights, tmp_path):
    path = one_directory(tmp_path / "w", weights)
    for name in ("predict_llama2_70b.yaml", "predict_llama2_13b.yaml"):
        write_yaml(path / name)
    with pytest.raises(CheckpointError, match=r"one YAML file.*or give it as config=YAML"):
        resolved(f"checkpoint={path}")
    assert resolved(f"config={path / name}", f"checkpoint={path}").checkpoint.eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "config.json is missing, which says what the model is; copy it beside the weights, or"),
        (["model.rope_theta=5e5"], "config.json is missing, which says what the model is"),
        (["model.hidden_size=64", "model.vocab_size=2048"],
         r"lacks architectures \(MindFormers' arch.type\), intermediate_size, num_hidden_layers \(Mind"
         r".*add that to the YAML of config=YAML, or copy config.json"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_both_ways(words, sentence, weights, tmp_path):
    path = one_directory(tmp_path / "w", weights)
    with pytest.raises(CheckpointError, match=sentence):
        resolved(f"checkpoint={path}", *words)


def test_keys_that_the_yaml_lacks_are_named(weights, tmp_path):
    path = one_directory(tmp_path / "w", weights)
    yaml_file = write_yaml(tmp_path / "p.yaml", num_layers=None)
    with pytest.raises(
        CheckpointError, match=r"lacks num_hidden_layers \(MindFormers' num_layers\);"
    ):
        resolved(f"config={yaml_file}", f"checkpoint={path}")


def test_a_shape_without_an_end_of_sequence_is_said(weights, tmp_path):
    path = one_directory(tmp_path / "w", weights)
    shape = {key: CONFIG[key] for key in ("vocab_size", "hidden_size", "intermediate_size",
             "num_hidden_layers", "num_attention_heads", "num_key_value_heads")}  # fmt: skip
    words = [f"checkpoint={path}", "model.architectures=[LlamaForCausalLM]"]
    words += [f"model.{key}={value}" for key, value in shape.items()]
    note = "nothing says which token ends an answer"
    assert any(note in said for said in resolved(*words).notes)
    assert not any(note in said for said in resolved(*words, "model.eos_token_id=[2]").notes)


def test_the_tokenizer_beside_the_weights_goes_before_vocab_file_and_is_named(
    weights, given, tmp_path
):
    path = one_directory(tmp_path / "w", weights)
    shutil.copyfile(DEMO / "tokenizer.model", path / "tokenizer.model")
    config, said = composed(f"config={given}", f"checkpoint={path}")
    assert config.tokenizer is None
    assert "  tokenizer.model lies beside the weights: processor.tokenizer.vocab_file=spm" in said


def test_a_vocab_file_counts_from_the_working_directory_then_from_the_yaml(
    weights, given, tmp_path, monkeypatch
):
    path = one_directory(tmp_path / "w", weights)
    config, said = composed(f"config={given}", f"checkpoint={path}")
    assert config.tokenizer == str(given.parent / "spm.model")
    assert "processor.tokenizer.vocab_file" not in said
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(DEMO / "tokenizer.model", tmp_path / "spm.model")
    config, _ = composed(f"config={given}", f"checkpoint={path}")
    assert config.tokenizer == str(tmp_path / "spm.model")


def test_a_vocab_file_that_is_nowhere_is_said_and_missed(weights, given, tmp_path):
    path = one_directory(tmp_path / "w", weights)
    with_tokenizer(given, "gone.model")
    words = [f"config={given}", f"checkpoint={path}", "prompt=x"]
    assert (
        "no such file, here or beside the YAML: processor.tokenizer.vocab_file=gone"
        in (composed(*words)[1])
    )
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json.*or write tokenizer=PATH"):
        make_job(compose(words), PLAIN)


def test_tokenizer_file_is_theirs_for_a_json(weights, given, tmp_path):
    path = one_directory(tmp_path / "w", weights)
    (given.parent / "tok.json").write_text("{}")
    with_tokenizer(given, "tok.json", "tokenizer_file")
    config, _ = composed(f"config={given}", f"checkpoint={path}")
    assert config.tokenizer == str(given.parent / "tok.json")


@pytest.mark.parametrize("name", ["spm.model", "a file of any name", ""])
def test_a_tokenizer_may_be_given_as_a_file_or_a_directory(name, original, tmp_path):
    path = tmp_path / (name or "directory")
    if name:
        shutil.copyfile(DEMO / "tokenizer.model", path)
    else:
        path.mkdir()
        shutil.copyfile(DEMO / "tokenizer.model", path / "tokenizer.model")
    bare = Path(shutil.copytree(original, tmp_path / "bare"))
    (bare / "tokenizer.model").unlink()
    words = [f"checkpoint={bare}", "prompt=Once upon a time"]
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        make_job(compose(words), PLAIN)
    job, _ = make_job(compose([*words, f"tokenizer={path}"]), PLAIN)
    assert list(job.prompts[0].token_ids) == open_tokenizer(DEMO).encode("Once upon a time")


# ----------------------------------------------------------------------------- prepare and export


def test_prepare_and_export_write_directories_that_are_whole(original, weights, given, tmp_path):
    bare = one_file(tmp_path / "w", weights)
    words = [f"config={given}", "parallel.tp=2"]
    made = tmp_path / "prepared"
    prepare(compose(["task=prepare", f"checkpoint={bare}", f"output={made}", *words]), PLAIN)
    out = tmp_path / "export"
    export(compose(["task=export", f"checkpoint={made}", f"output={out}", words[0]]), PLAIN)
    for path in (made, out):
        values = json.loads((path / "config.json").read_text())
        assert (values["model_type"], values["hidden_act"]) == ("llama", "silu")
        assert open_checkpoint(path).config == open_checkpoint(original).config
        assert open_checkpoint(path).eos_token_ids == (2,)
        assert open_tokenizer(path).encode("Once upon") == open_tokenizer(DEMO).encode("Once upon")
    expected = load_file(original / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_tokenizer_leaves_none_of_the_sources_beside_it(original, tmp_path):
    assert (original / "tokenizer_config.json").exists()
    shutil.copyfile(DEMO / "tokenizer.model", tmp_path / "spm")
    out = tmp_path / "prepared"
    words = [f"checkpoint={original}", f"output={out}", f"tokenizer={tmp_path / 'spm'}"]
    prepare(compose(["task=prepare", *words]), PLAIN)
    assert (out / "tokenizer.model").exists()
    assert not (out / "tokenizer_config.json").exists()


@pytest.mark.parametrize("name", ["gone", "empty", "garbage", "x" * 300])
def test_a_tokenizer_that_cannot_be_read_is_not_written_beside_weights(name, original, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's form
    words = [f"checkpoint={original}", f"output={tmp_path / 'out'}", f"tokenizer={tmp_path / name}"]
    with pytest.raises(CheckpointError, match=str(tmp_path / name)):
        prepare(compose(["task=prepare", *words]), PLAIN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["prepare", "export"])
def test_compute_dtype_is_set_aside_where_tensors_keep_their_dtype(task, original, tmp_path, given):
    values = yaml.safe_load(given.read_text())
    values["model"]["model_config"]["compute_dtype"] = "bfloat16"
    given.write_text(yaml.safe_dump(values))
    made = prepared_by(original, tmp_path / "tp1", 1, QuantScheme())
    words = [f"task={task}", f"config={given}", f"output={tmp_path / 'out'}", f"checkpoint={made}"]
    config, said = composed(*words)
    assert f"  {task} keeps the checkpoint's dtype: compute_dtype=bfloat16" in said
    {"prepare": prepare, "export": export}[task](config, PLAIN)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == json.loads((original / "config.json").read_text())
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ConfigError, match=f"`dtype` must be auto for {task}"):
        {"prepare": prepare, "export": export}[task](compose([*words, "dtype=float16"]), PLAIN)


def test_plan_counts_a_bare_checkpoint_by_its_yaml(weights, given, tmp_path, capsys):
    path = two_ranks(tmp_path / "w", weights) / "rank_0" / "x.ckpt"
    how = ["plan.bandwidth_gb_s=1", "plan.disk_gb_s=1", "plan.memory_gb=1", "plan.json=true"]
    plan(compose(["task=plan", f"config={given}", f"checkpoint={path}", *how]), PLAIN)
    json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------------ quantization


@pytest.mark.parametrize("block", [RTN_BLOCK, PTQ_BLOCK], ids=["rtn", "ptq"])
@pytest.mark.parametrize("how", ["beside", "elsewhere"])
def test_a_scheme_in_a_yaml_quantizes_float_weights_wherever_it_lies(block, how, weights, tmp_path):
    path = one_directory(tmp_path / "w", weights)
    if how == "beside":
        write_yaml(path / "predict.yaml", block)
        words = [f"checkpoint={path}"]
    else:
        words = [f"config={write_yaml(tmp_path / 'p.yaml', block)}", f"checkpoint={path}"]
    if block is PTQ_BLOCK:
        with pytest.raises(ConfigError, match="ptq needs calibration, which generate does not do"):
            resolved(*words)
        return
    found = resolved(*words)
    assert found.layout.scheme == RTN
    assert found.config.quant.scheme() == RTN
    assert found.checkpoint.own_scheme is None
    assert resolved(*words, "quant=none").layout.scheme == QuantScheme()
    fields = resolved(*words, "quant.modules_to_not_convert=[w2,lm_head]").layout.scheme
    assert fields == dataclasses.replace(RTN, modules_to_not_convert=("w2", "lm_head"))


def test_what_a_yaml_beside_float_weights_asks_for_is_said(weights, tmp_path):
    path = one_directory(tmp_path / "w", weights)
    write_yaml(path / "predict.yaml", RTN_BLOCK)
    said = f"{path / 'predict.yaml'} asks for w8a16 (quant=none leaves the weights as they are)"
    assert composed(f"checkpoint={path}")[1] == said
    assert composed(f"checkpoint={path}", "quant=rtn_a16w4")[1] == ""


def test_golden_sticks_files_are_read_by_the_yaml_that_is_given(original, tmp_path):
    made = merged(prepared_by(original, tmp_path / "tp1", 1, RTN))
    path = write_ckpt(tmp_path / "w" / "rank_0" / "rtn-a16w8.ckpt", their_tensors(made, rtn_06))
    yaml_file = write_yaml(tmp_path / "p.yaml", RTN_BLOCK, compute_dtype="float16")
    found = resolved(f"config={yaml_file}", f"checkpoint={path}")
    assert found.checkpoint.own_scheme == RTN
    name, rows = "model.layers.0.self_attn.q_proj.weight", (slice(0, 64), slice(0, 64))
    again = open_job(from_yaml(to_yaml(found.config)))
    assert torch.equal(again.source.read(name, rows), made[name])
    plain = write_yaml(tmp_path / "plain.yaml")
    with pytest.raises(
        CheckpointError, match=r"Golden Stick has quantized.*give it as config=YAML"
    ):
        resolved(f"config={plain}", f"checkpoint={path}")
