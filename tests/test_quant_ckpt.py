"""scripts/quant_ckpt.py: each flag of Golden Stick's is translated or refused in a sentence."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from filecmp import cmp
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config import compose
from launcher.failures import USER_ERRORS
from launcher.golden_stick.flags import APPROACHES, FLAGS
from launcher.golden_stick.links import link_output, link_ranks
from launcher.golden_stick.program import read_line
from launcher.schema import QuantSection
from parallel.checkpoint.readers.prepared import SHARD_FILE
from quant.errors import QuantError

SCRIPT = Path(__file__).parent.parent / "scripts" / "quant_ckpt.py"
DEMO = Path(__file__).parent.parent / "launcher" / "demo"
# Granularities are Golden Stick's defaults; lm_head is in none of the decoder layers it walks.
WEIGHTS = {
    "weight_quant_granularity": "per_channel",
    "group_size": "null",
    "modules_to_not_convert": '["lm_head"]',
}
CACHE = {"kvcache_quant_granularity": "per_channel"}
ACTIVATIONS = {"act_quant_granularity": "per_tensor"}
OFF = dict.fromkeys(
    ("weight_dtype", "activation_dtype", "kvcache_dtype", "outliers_suppression"), "null"
) | {"precision_recovery": "null"}
BOOLQ = "-s boolq/dev.jsonl -t boolq"
# Flags behind `-c m`; the preset, the fields of `quant`, and the name of the output.
CASES: list[tuple[str, str, dict[str, str], str]] = [
    (
        "-q ptq -w int8 -a int8 -k int8 -o smooth",
        "ptq",
        OFF
        | {"weight_dtype": "int8", "activation_dtype": "int8", "kvcache_dtype": "int8"}
        | {"outliers_suppression": "smooth"} | WEIGHTS | ACTIVATIONS | CACHE,
        "m_ptq_smooth_a8w8c8_ckpt",
    ),
    (
        "-q ptq -w int8",
        "ptq",
        OFF | {"weight_dtype": "int8"} | WEIGHTS,
        "m_ptq_no_smooth_a16w8_ckpt",
    ),
    (
        "-q ptq -k int8 -kvg per_token",
        "ptq",
        OFF | {"kvcache_dtype": "int8", "kvcache_quant_granularity": "per_token"},
        "m_ptq_no_smooth_a16w16c8_ckpt",
    ),
    (
        "-q ptq -w int8 -a int8 -ag per_token -b w2",
        "ptq",
        OFF | {"weight_dtype": "int8", "activation_dtype": "int8"} | WEIGHTS
        | {"act_quant_granularity": "per_token", "modules_to_not_convert": '["lm_head","w2"]'},
        "m_ptq_no_smooth_a8dynw8_ckpt",
    ),
    (
        "-q ptq -w int4 -o awq -wg per_group -g 128 -b lm_head",
        "ptq",
        OFF | {"weight_dtype": "int4", "outliers_suppression": "awq"} | WEIGHTS
        | {"weight_quant_granularity": "per_group", "group_size": "128"},
        "m_ptq_awq_a16w4_ckpt",
    ),
    (
        "-q ptq -w int4 -p gptq -wg per_group -g 64 -b",
        "ptq",
        OFF | {"weight_dtype": "int4", "precision_recovery": "gptq"} | WEIGHTS
        | {"weight_quant_granularity": "per_group", "group_size": "64"},
        "m_ptq_no_smooth_gptq_a16w4_ckpt",
    ),
    ("-q rtn-a16w8", "rtn_a16w8", WEIGHTS, "m_rtn-a16w8_ckpt"),
    (
        "-q rtn-a16w8 -w int8 -a none -b wo -b w2 layers.*.wq",
        "rtn_a16w8",
        WEIGHTS | {"modules_to_not_convert": '["lm_head","wo","w2","layers.*.wq"]'},
        "m_rtn-a16w8_ckpt",
    ),
    (
        "-q smooth_quant",
        "smooth_quant",
        WEIGHTS | ACTIVATIONS | {"modules_to_not_convert": '["lm_head","w2"]'},
        "m_smooth_quant_ckpt",
    ),
    (
        "-q smooth_quant -o smooth -ag per_token -b wo",
        "smooth_quant",
        WEIGHTS | {"act_quant_granularity": "per_token"}
        | {"modules_to_not_convert": '["lm_head","w2","wo"]'},
        "m_smooth_quant_ckpt",
    ),
    ("-q rtn-c8", "rtn_c8", CACHE, "m_rtn-c8_ckpt"),
    ("-q ptq -e False -d '' -w int8", "ptq", OFF | {"weight_dtype": "int8"} | WEIGHTS,
     "m_ptq_no_smooth_a16w8_ckpt"),
    ("-q ptq -wint8 -ag per_tensor -g 0", "ptq", OFF | {"weight_dtype": "int8"} | WEIGHTS,
     "m_ptq_no_smooth_a16w8_ckpt"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint's directory called m, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    return tmp_path / "m"


def translate(line: str) -> list[str]:
    return read_line(shlex.split(line)).words


def values(line: str) -> dict[str, str]:
    """The words behind `prepare`, none of which sets a key again."""
    task, *rest = translate(line)
    assert task == "prepare"
    found = dict(word.split("=", 1) for word in rest)
    assert len(found) == len(rest)
    return found


def refusal(line: str) -> str:
    with pytest.raises(USER_ERRORS) as caught:
        translate(line)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))
    return sentence


def predict_yaml(folder: Path, **changed: Any) -> str:
    """A MindFormers predict YAML; None takes a key out."""
    whole = {
        "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "llama2_13b"},
        "load_checkpoint": "m",
        "use_parallel": True,
        "parallel_config": {"model_parallel": 2},
        "model": {"model_config": {"compute_dtype": "float16"}},
        **changed,
    }
    path = folder / "predict_llama2_13b.yaml"
    path.write_text(yaml.safe_dump({key: item for key, item in whole.items() if item is not None}))
    return path.name


# ------------------------------------------------------------------------------------ translation


@pytest.mark.parametrize(("flags", "preset", "fields", "name"), CASES)
def test_flags_become_words(flags: str, preset: str, fields: dict[str, str], name: str) -> None:
    assert values(f"-c m {flags}") == {
        "checkpoint": "m",
        "quant": preset,
        **{f"quant.{field}": value for field, value in fields.items()},
        "output": f"output/{name}",
    }


def test_the_line_of_the_documentation_becomes_these_words() -> None:
    line = (
        "-c m -s ../shared/data/boolq/dev.jsonl -t boolq -q ptq -w int8 -a int8 -k int8 -o smooth"
    )
    assert translate(line) == [
        "prepare",
        "checkpoint=m",
        "quant=ptq",
        "quant.weight_dtype=int8",
        "quant.activation_dtype=int8",
        "quant.kvcache_dtype=int8",
        "quant.outliers_suppression=smooth",
        "quant.precision_recovery=null",
        "quant.act_quant_granularity=per_tensor",
        "quant.weight_quant_granularity=per_channel",
        "quant.kvcache_quant_granularity=per_channel",
        "quant.group_size=null",
        'quant.modules_to_not_convert=["lm_head"]',
        "calibration.data=../shared/data/boolq/dev.jsonl",
        "output=output/m_ptq_smooth_a8w8c8_ckpt",
    ]


def test_long_flags_mean_the_same() -> None:
    short = "-c m -q ptq -w int4 -a int8 -k int8 -o smooth -p gptq -ag per_token -wg per_group "
    short += "-kvg per_token -g 128 -b w2 -s boolq.jsonl -t boolq"
    names = {flag.short: f"--{flag.long}" for flag in FLAGS} | {
        "-c": "--config_path", "-q": "--approach", "-b": "--opname_blacklist",
        "-s": "--dataset_path", "-t": "--dataset_type",
    }  # fmt: skip
    long = " ".join(names.get(word, word) for word in short.split())
    assert set(names) == {word for word in short.split() if word.startswith("-")}
    assert translate(long) == translate(short)


def test_flags_are_read_in_any_case() -> None:
    small = "-c m -q ptq -w int4 -a int8 -k int8 -o smooth -p gptq -ag per_token -wg per_group "
    small += "-kvg per_token -s boolq.jsonl -t boolq -e false"
    keys = ("-c", "-s")
    words = small.split()
    large = [
        word if word.startswith("-") or words[at - 1] in keys else word.upper()
        for at, word in enumerate(words)
    ]
    assert translate(shlex.join(large)) == translate(small)


@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("change", [str.upper, str.title])
def test_an_approach_in_any_case_names_the_output_in_small_letters(
    approach: str, change: Callable[[str], str]
) -> None:
    small = f"-c m -q {approach} -k int8" if approach == "ptq" else f"-c m -q {approach}"
    assert translate(small.replace(approach, change(approach))) == translate(small)


@pytest.mark.parametrize("data", [BOOLQ, "-s anything", "-t squad1.1", "-s dev.txt -t boolq"])
def test_data_of_an_approach_that_is_not_calibrated_are_a_note(data: str) -> None:
    line = read_line(shlex.split(f"-c m -q rtn-a16w8 {data}"))
    assert line.words == translate("-c m -q rtn-a16w8")
    used = " ".join(word for word in data.split() if word in ("-s", "-t"))
    assert line.notes == [
        f"not used: {used} (-q rtn-a16w8 is not calibrated, in Golden Stick neither)"
    ]


def test_the_english_guides_line_names_the_approach_by_a() -> None:
    assert translate(f"-c m {BOOLQ} -a RTN-a16w8") == translate("-c m -q rtn-a16w8")


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (BOOLQ, "boolq/dev.jsonl"),
        ("-s my.jsonl -t jsonl", "my.jsonl"),
        ("-s wiki.test.tokens -t wikitext2", "wiki.test.tokens"),
        ("-s 'my text = 1.txt' -t text", "my text = 1.txt"),
        ("-s anything", "anything"),
    ],
)
def test_the_data_of_s_are_what_prepare_calibrates_on(data: str, path: str) -> None:
    assert values(f"-c m -q smooth_quant {data}")["calibration.data"] == path


@pytest.mark.parametrize("case", [case for case in CASES if case[1] in ("rtn_a16w8", "ptq")])
def test_shardrun_reads_the_words_of_quant(case: tuple[str, str, dict[str, str], str]) -> None:
    flags, _, fields, _ = case
    found = [word for word in translate(f"-c m {flags}") if word.startswith("quant")]
    read = compose(found).quant
    assert read.quant_method == ("rtn" if "rtn" in flags else "ptq")
    assert {field: getattr(read, field) for field in fields} == {
        field: yaml.safe_load(value) for field, value in fields.items()
    }


@pytest.mark.parametrize("pattern", ["it's", 'a\\"b', "end\\", "x,y]", "null", "*.w2", "a b"])
def test_any_pattern_of_b_arrives_as_it_is(pattern: str) -> None:
    found = read_line(["-c", "m", "-q", "rtn-a16w8", "-b", pattern]).words
    quant = compose([word for word in found if word.startswith("quant")]).quant
    assert quant.modules_to_not_convert == ["lm_head", pattern]


def test_golden_sticks_rtn_leaves_the_same_modules_alone_as_mindformers_file() -> None:
    read = compose(
        [word for word in translate("-c m -q rtn-a16w8 -b w2") if word.startswith("quant")]
    )
    modules = tuple(f"layers.0.{name}" for name in ("self_attn.q_proj", "mlp.down_proj"))
    assert read.quant.scheme().left_out((*modules, "lm_head")) == {
        "layers.0.mlp.down_proj",
        "lm_head",
    }


def test_ptq_without_a_dtype_is_refused_rather_than_written_unquantized() -> None:
    found = [word for word in translate("-c m -q ptq") if word.startswith("quant")]
    with pytest.raises(QuantError, match="nothing would be quantized"):
        compose(found).quant.scheme()


# ------------------------------------------------------------------------- the model and its names


def test_a_mindformers_yaml_is_read_by_prepare_and_names_the_model(tmp_path: Path) -> None:
    path = predict_yaml(tmp_path)
    found = values(f"-c {path} -q rtn-a16w8")
    assert "checkpoint" not in found
    assert found["config"] == path
    assert found["output"] == "output/llama2_13b_rtn-a16w8_ckpt"
    config = compose(["task=prepare", *(f"{key}={value}" for key, value in found.items())])
    assert (config.checkpoint, config.parallel.tp) == ("m", 2)


def test_the_output_lies_in_the_output_dir_of_the_yaml(tmp_path: Path) -> None:
    path = predict_yaml(tmp_path, output_dir="./elsewhere")
    assert values(f"-c {path} -q rtn-a16w8")["output"] == "elsewhere/llama2_13b_rtn-a16w8_ckpt"


@pytest.mark.parametrize(
    ("named", "model_name"),
    [("m", "m"), ("weights.v1/llama.v2", "llama.v2"), ("llama2.ckpt", "llama2")],
)
def test_without_a_model_name_the_checkpoint_names_the_output(
    tmp_path: Path, named: str, model_name: str
) -> None:
    (tmp_path / "llama2.ckpt").touch()
    path = predict_yaml(tmp_path, trainer=None, load_checkpoint=named)
    assert values(f"-c {path} -q rtn-a16w8")["output"] == f"output/{model_name}_rtn-a16w8_ckpt"


def test_a_yaml_without_a_checkpoint_takes_one_from_the_words(tmp_path: Path) -> None:
    path = predict_yaml(tmp_path, trainer=None, load_checkpoint="")
    found = values(f"-c {path} -q rtn-a16w8 checkpoint=/data/llama")
    assert (found["checkpoint"], found["output"]) == ("/data/llama", "output/llama_rtn-a16w8_ckpt")
    assert "names no checkpoint; set load_checkpoint" in refusal(f"-c {path} -q rtn-a16w8")


def test_reading_the_yaml_for_its_names_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # It is prepare that says, once, what of the file is not used.
    translate(f"-c {predict_yaml(tmp_path)} -q rtn-a16w8")
    assert capsys.readouterr() == ("", "")


def test_words_of_prepare_are_its_own_wherever_they_stand() -> None:
    own = "parallel.tp=2 output=here seed=3 calibration.num_samples=8 calibration.max_length=64"
    before, after = values(f"{own} -c m -q ptq"), values(f"-c m -q rtn-a16w8 -b w2 {own}")
    assert before.items() >= dict(word.split("=") for word in own.split()).items()
    assert after.items() >= dict(word.split("=") for word in own.split()).items()
    assert after["quant.modules_to_not_convert"] == '["lm_head","w2"]'


def test_a_word_of_prepare_may_replace_what_no_flag_says() -> None:
    found = values("-c m -q smooth_quant quant.modules_to_not_convert=[] quant.algorithm_args={}")
    assert found["quant.modules_to_not_convert"] == "[]"
    assert found["quant.algorithm_args"] == "{}"


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "required: -c/--config_path, -q/--approach; see --help."),
        ("-c m", "required: -q/--approach"),
        ("-c m -q", "expected one argument"),
        ("-c gone.yaml -q ptq", "gone.yaml cannot be read"),
        ("-c m -q rtn_a16w8", "`-q` must be one of rtn-a16w8, rtn-c8, smooth_quant, ptq, but is "
         "'rtn_a16w8'; did you mean rtn-a16w8?"),
        ("-c m -q SmoothQuant", "did you mean smooth_quant?"),
        ("-c m -q omni", "but is 'omni'; write one of them."),
        ("-c m -q ptq -w int-8", "`-w` must be one of none, int8, int4, but is 'int-8'; did you "
         "mean int8?"),
        ("-c m -q ptq -a int4", "`-a` must be one of none, int8"),
        ("-c m -q ptq -k fp8", "`-k` must be one of none, int8"),
        ("-c m -q ptq -o smoth", "did you mean smooth?"),
        ("-c m -q ptq -w int8 -o outlier-suppression+", "`-o` must be one of none, smooth, awq"),
        ("-c m -q ptq -p qptg", "did you mean gptq?"),
        ("-c m -q ptq -w int8 -wg per_token", "`-wg` must be one of per_channel, per_group"),
        ("-c m -q ptq -w int8 -g 100", "`-g` must be one of 0, 32, 64, 128"),
        ("-c m -q ptq -w int8 -ag per_token", "no effect while -a is none"),
        ("-c m -q ptq -w int8 -kvg per_token", "no effect while -k is none"),
        ("-c m -q ptq -k int8 -wg per_group", "no effect while -w is none"),
        ("-c m -q ptq -k int8 -g 64", "no effect while -w is none"),
        ("-c m -q ptq -k int8 -b w2", "`-b` is 'w2', which has no effect"),
        ("-c m -q rtn-c8 -b w2", "`-b` is 'w2', which has no effect"),
        ("-c m -q rtn-a16w8 -a int8", "`-a` must be none with -q rtn-a16w8, but is 'int8'"),
        ("-c m -q rtn-a16w8 -w int4", "`-w` must be int8 with -q rtn-a16w8"),
        ("-c m -q rtn-c8 -w int8", "`-w` must be none with -q rtn-c8"),
        ("-c m -q smooth_quant -o none", "`-o` must be smooth with -q smooth_quant"),
        ("-c m -q smooth_quant -k int8", "`-k` must be none with -q smooth_quant"),
        ("-c m -q smooth_quant -p gptq", "`-p` must be none with -q smooth_quant"),
        ("-c m -a int8", "required: -q/--approach"),
        ("-c m -q ptq -w int8 -t boolq", "`-t` is boolq, but there is no -s"),
        ("-c m -q ptq -s x.jsonl -t boolqq", "did you mean boolq?"),
        ("-c m -q ptq -s x.json -t squad1.1", "`-t` must be one of boolq, jsonl, wikitext2, text"),
        ("-c m -q ptq -s dev.txt -t boolq", "`-s` must end in .jsonl with -t boolq"),
        ("-c m -q ptq -s x.jsonl -t wikitext2", "`-s` must be plain text, not .jsonl"),
        ("-c m -q ptq -e True", "`-e` (debug_mode) is 'True', but shardrun prepare has nothing"),
        ("-c m -q ptq -d dump", "`-d` (dump_path) is 'dump', but shardrun prepare has nothing"),
        ("-c m -q ptq -w int8 -w int4", "`-w` must be given once, but is int8, int4"),
        ("-c m -c n -q ptq", "`-c` must be given once"),
        ("-c m -q ptq --weigth_quant_dtype int8", "did you mean --weight_quant_dtype?"),
        ("-c m -q ptq --weight int8", "'--weight' is neither a flag of quant_ckpt.py nor"),
        ("-c m -q ptq parallel.tp 2", "'parallel.tp' is neither a flag"),
        ("-c m -q ptq -w int8 quant.weight_dtype=int4", "`quant.weight_dtype` is said by -w as well"),
        ("-c m -q ptq quant=rtn_a16w8", "`quant` is said by -q as well"),
        ("-c m -q ptq checkpoint=n", "`checkpoint` is said by -c as well"),
        (f"-c m -q ptq {BOOLQ} calibration.data=x", "`calibration.data` is said by -s as well"),
        ("-c m -q ptq -w int8 -b w2 quant.modules_to_not_convert=[]", "is said by -b as well"),
    ],
)  # fmt: skip
def test_what_cannot_be_translated_is_refused(line: str, sentence: str) -> None:
    assert sentence in refusal(line)


def test_a_yaml_of_a_quantized_model_is_refused(tmp_path: Path) -> None:
    block = {"quant_method": "rtn", "weight_dtype": "int8"}
    path = predict_yaml(tmp_path, model={"model_config": {"quantization_config": block}})
    said = refusal(f"-c {path} -q rtn-a16w8")
    assert "`quant.weight_dtype` = 'int8', but the flags say what is quantized" in said


def test_a_yaml_that_mindformers_could_not_mean_is_refused_in_prepares_words(
    tmp_path: Path,
) -> None:
    path = predict_yaml(tmp_path, context={"device_target": "TPU"})
    assert "`context.device_target`" in refusal(f"-c {path} -q rtn-a16w8")


# --------------------------------------------------------------------------------- the presets, too


@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("smooth_quant", {"quant_method": "smooth_quant", "weight_dtype": "int8",
                          "activation_dtype": "int8", "outliers_suppression": "smooth"}),
        ("ptq", {"quant_method": "ptq", "weight_dtype": "int8"}),
        ("awq", {"quant_method": "ptq", "weight_dtype": "int4", "outliers_suppression": "awq",
                 "weight_quant_granularity": "per_group", "group_size": 128}),
        ("gptq", {"quant_method": "ptq", "weight_dtype": "int4", "precision_recovery": "gptq",
                  "weight_quant_granularity": "per_group", "group_size": 128}),
    ],
)  # fmt: skip
def test_a_preset_sets_these_fields(preset: str, fields: dict[str, Any]) -> None:
    assert compose([f"quant={preset}"]).quant == QuantSection(**fields)


# ------------------------------------------------------------------------------------ the program


def run(
    folder: Path,
    *arguments: str,
    program: tuple[str, ...] = (sys.executable, str(SCRIPT)),
    **more: str,
) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), **more}
    return subprocess.run(
        [*program, *arguments],
        cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("says_size", ["parallel.tp=2", "MS_WORKER_NUM=2"])
def test_it_writes_the_shards_that_prepare_writes(tmp_path: Path, says_size: str) -> None:
    key, size = says_size.split("=")
    flags = ("-c", str(DEMO), "-q", "rtn-a16w8", "-b", "w2")
    if key == "MS_WORKER_NUM":
        done = run(tmp_path, *flags, MS_WORKER_NUM=size)
    else:
        done = run(tmp_path, *flags, says_size)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("quant_ckpt.py: shardrun prepare checkpoint=")
    plain = run(
        tmp_path, "prepare", f"checkpoint={DEMO}", "quant=rtn_a16w8", "parallel.tp=2", "output=plain",
        "quant.modules_to_not_convert=[lm_head,w2]", program=(sys.executable, "-m", "launcher"),
    )  # fmt: skip
    assert plain.returncode == 0, plain.stderr
    for rank in ("rank_0", "rank_1"):
        ours = tmp_path / "output" / "demo_rtn-a16w8_ckpt" / rank / "model.safetensors"
        assert cmp(ours, tmp_path / "plain" / rank / "model.safetensors", shallow=False)


@pytest.mark.parametrize(
    ("flags", "alias", "file"),
    [
        ("-q RTN-a16w8", "rtn-a16w8_ckpt", "rtn-a16w8.ckpt"),
        ("-q rtn-c8 -kvg per_token", "rtn-c8_ckpt", "rtn-c8.ckpt"),
        ("-q ptq -w int8 -ag per_token -a int8", "ptq_no_smooth_a8dynw8_ckpt", "ptq.ckpt"),
    ],
)
def test_the_paths_of_the_guide_lead_to_what_is_written(
    tmp_path: Path, flags: str, alias: str, file: str
) -> None:
    line = read_line(["-c", "m", *shlex.split(flags)])
    assert (line.alias, f"{line.approach}.ckpt") == (alias, file)
    shards = [make_shard(line.output, rank) for rank in range(2)]
    assert link_ranks(line.output, line.approach)
    assert link_output(line.output, alias) == []
    for rank, shard in enumerate(shards):
        found = tmp_path / "output" / alias / f"rank_{rank}" / file
        copied = shutil.copy(found, tmp_path / "copied.ckpt")
        assert not copied.is_symlink()
        assert cmp(copied, shard, shallow=False)


def test_one_process_of_several_makes_the_links(tmp_path: Path) -> None:
    for rank in range(2):
        make_shard(tmp_path / "output", rank)
    assert link_ranks(tmp_path / "output", "ptq")
    assert not link_ranks(tmp_path / "output", "ptq")


def test_a_link_to_another_model_is_led_to_the_new_one_and_said(tmp_path: Path) -> None:
    link = tmp_path / "rtn-a16w8_ckpt"
    link.symlink_to("llama2_7b_rtn-a16w8_ckpt")
    assert link_output(tmp_path / "llama2_13b_rtn-a16w8_ckpt", link.name) == [
        f"{link} led to llama2_7b_rtn-a16w8_ckpt, and leads to llama2_13b_rtn-a16w8_ckpt now"
    ]
    assert os.readlink(link) == "llama2_13b_rtn-a16w8_ckpt"
    assert sorted(os.listdir(tmp_path)) == ["m", link.name]


@pytest.mark.parametrize("kind", ["directory", "file", "link elsewhere", "link of another name"])
def test_what_stands_at_the_guides_path_is_left_and_said(tmp_path: Path, kind: str) -> None:
    link = tmp_path / "ptq_ckpt"
    if kind == "directory":
        link.mkdir()
    elif kind == "file":
        link.write_text("mine")
    else:
        link.symlink_to("/data/a_ptq_ckpt" if kind == "link elsewhere" else "mine")
    before = os.lstat(link)
    (note,) = link_output(tmp_path / "m_ptq_ckpt", link.name)
    assert note.startswith(f"{link} is left as it is")
    assert os.lstat(link) == before


def test_a_disk_that_takes_no_links_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    make_shard(tmp_path / "m_ptq_ckpt", 0)
    monkeypatch.setattr(os, "symlink", refuse)
    assert link_ranks(tmp_path / "m_ptq_ckpt", "ptq")
    (note,) = link_output(tmp_path / "m_ptq_ckpt", "ptq_ckpt")
    assert note.endswith("(Operation not permitted); use " + str(tmp_path / "m_ptq_ckpt"))


def make_shard(output: Path, rank: int) -> Path:
    folder = output / f"rank_{rank}"
    folder.mkdir(parents=True)
    (folder / SHARD_FILE).write_text(f"shard {rank}")
    return folder / SHARD_FILE


def test_it_ends_with_prepares_status(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", str(DEMO), "-q", "rtn-a16w8", "-b", "w9")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("shardrun: `quant.modules_to_not_convert`")
    assert not (tmp_path / "output").exists()


def test_a_refusal_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", "m", "-q", "ptq", "-w", "int-8")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("quant_ckpt.py: `-w` must be one of")


def test_help_says_what_each_flag_takes(tmp_path: Path) -> None:
    done = run(tmp_path, "-h")
    assert done.returncode == 0
    assert all(f"--{flag.long}" in done.stdout for flag in FLAGS)


def test_the_script_is_a_program(tmp_path: Path) -> None:
    # Started by its name, with the interpreter of the environment first on PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    assert run(tmp_path, "-h", program=(str(SCRIPT),), PATH=path).returncode == 0
