"""What a user gets wrong ends with status 2 and one sentence, before anything is written.

Each case is a fact, the words of the command line, what the sentence must name, and perhaps what
was done to a good checkpoint before. `@` in a word stands for that checkpoint's directory.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.__main__ import main
from tests.checkpoints import CONFIG, random_weights, write_checkpoint, write_weights

ROOT = Path(__file__).resolve().parents[1]
INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
GENERATE = ("generate", "checkpoint=@", "prompt=Hello")
PREPARE = ("prepare", "checkpoint=@", "quant=rtn_a16w8", "output=../new/out")
EVAL = ("eval", "checkpoint=@", "eval.questions=@/q.jsonl")
QUESTION = '{"question": "is it", "passage": "it is", "answer": true}'
GPTQ = ("prepare", "checkpoint=@", "quant=gptq", "output=../new/out")
TEXTS = ROOT / "launcher" / "demo" / "calibration.txt"
Damage = Callable[[Path], Any]


def written(name: str, data: bytes | str) -> Damage:
    return lambda path: (path / name).write_bytes(
        data if isinstance(data, bytes) else data.encode()
    )


def removed(name: str) -> Damage:
    return lambda path: (path / name).unlink()


def edited(name: str, edit: Callable[[Any], object]) -> Damage:
    """A JSON file whose contents `edit` changed in place."""

    def damage(path: Path) -> None:
        values = json.loads((path / name).read_text())
        edit(values)
        (path / name).write_text(json.dumps(values))

    return damage


def config(**values: Any) -> Damage:
    return edited("config.json", lambda found: found.update(values))


def shard_of(name: str, file: str) -> Damage:
    return edited(INDEX, lambda found: found["weight_map"].update({name: file}))


def stored(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """An entry of the manifest."""
    return edited("manifest.json", lambda found: edit(found["tensors"][UP]))


def weight(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    """Weights of which one is changed, or dropped where `change` returns None."""

    def damage(path: Path) -> None:
        weights = random_weights(CONFIG, torch.float32, 0)
        changed = change(weights.pop(name))
        write_weights(path, weights if changed is None else {**weights, name: changed})

    return damage


def header(entry: dict[str, Any]) -> Damage:
    """A safetensors file of one tensor with this entry, and 16 bytes of data."""
    text = json.dumps({"model.norm.weight": entry}).encode()
    return written("model.safetensors", struct.pack("<Q", len(text)) + text + bytes(16))


def cut_off(name: str, num_bytes: int) -> Damage:
    return lambda path: os.truncate(path / name, num_bytes)


def pipe(name: str) -> Damage:
    def damage(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return damage


def ranks_swapped(path: Path) -> None:
    for old, new in (("rank_0", "kept"), ("rank_1", "rank_0"), ("kept", "rank_1")):
        (path / old).rename(path / new)


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[3, 5] = float("nan")
    return tensor


def case(fact: str, words: tuple[str, ...], says: tuple[str, ...], damage: Damage | None = None):
    return pytest.param(words, says, damage, id=fact.replace(" ", "_"))


def prompts(*words: str) -> tuple[str, ...]:
    return ("generate", "checkpoint=@", *words)


COMMAND_LINES = [
    case("misspelt task", ("generat",), ("'generat'", "generate")),
    case("task of another name", ("task.name=gen",), ("`task`", "'gen'", "generate")),
    case("key without its section", ("tp=2",), ("`tp`", "`parallel.tp`")),
    case("word for a number", ("parallel.tp=two",), ("`parallel.tp`", "integer", "'two'")),
    case("fraction for an integer", ("parallel.tp=2.5",), ("`parallel.tp`", "2.5")),
    case("interpolation in a circle", ("device=${device}",), ("`device`", "${device}")),
    case("unknown device", ("device=tpu",), ("`device`", "cuda", "'tpu'")),
    case("dtype without arithmetic", ("dtype=int8",), ("`dtype`", "bfloat16", "'int8'")),
    case("no ranks", ("parallel.tp=0",), ("`parallel.tp`", "at least 1", "0")),
    case("data parallel replicas", ("plan", "parallel.dp=2"), ("`parallel.dp`", "1", "2")),
    case("deadline that is no time", ("parallel.timeout_s=nan",), ("`parallel.timeout_s`", "nan")),
    case("no new tokens", ("generation.max_new_tokens=0",), ("`generation.max_new_tokens`", "0")),
    case(
        "temperature that float32 cannot divide by",
        ("generation.do_sample=true", "generation.temperature=1e-320"),
        ("`generation.temperature`", "1e-320"),
    ),
    case(
        "two lengths",
        ("generation.max_new_tokens=5", "generation.max_length=9"),
        ("`generation.max_new_tokens`", "`generation.max_length`"),
    ),
    case("half a character", ("prompt=\udcff",), ("`prompt`", "UTF-8", "'\\udcff'")),
    case("list of numbers for texts", ("prompts=[1_0]",), ("`prompts`", "strings", "10")),
    case("brackets without end", ("prompts=" + "[" * 3000,), ("`prompts`",)),
    case("deadline no float holds", ("parallel.timeout_s=" + "9" * 400,), ("timeout_s", "number")),
    case("integer Python does not read", ("seed=" + "9" * 5000,), ("`seed`", "digits", "shorten")),
    case("path of an unset variable", ("checkpoint=",), ("`checkpoint`", "''")),
    case("missing checkpoint", ("checkpoint=/no/such",), ("`checkpoint`", "/no/such")),
    case("file name beyond the limit", ("checkpoint=/" + "a" * 400,), ("`checkpoint`", "long")),
    case("name of a YAML beyond the limit", ("config=/" + "a" * 400,), ("`config`", "too long")),
    case("plan of no length", ("plan", "plan.max_length=0"), ("`plan.max_length`", "0")),
    case("plan of sizes without end", ("plan", "plan.max_tp=999999999"), ("max_tp", "65536")),
    case("plan of more than a float", ("plan", "plan.memory_gb=1e308"), ("memory_gb", "1e15")),
    case("seats for more ranks than memory", ("env", "parallel.tp=1" + "0" * 12), ("parallel.tp",)),
    case("plan of an unknown kernel", ("plan", "kernel=fast"), ("`kernel`", "native", "'fast'")),
    case(
        "device of what reads files",
        ("check", "checkpoint=@", "device=cuda"),
        ("`device`", "check"),
    ),
    case("GPU for what computes on CPUs", (*PREPARE, "device=cuda"), ("`device`", "prepare")),
    case("dtype of what computes nothing", ("env", "dtype=float16"), ("`dtype`", "env")),
    case("plan of an endless bandwidth", ("plan", "plan.bandwidth_gb_s=inf"), ("inf",)),
    case("shape without weights", ("prompt=a", "model=llama2_7b"), ("`model`", "checkpoint=")),
]

DAMAGED = [
    case("checkpoint is a file", ("checkpoint=@/config.json",), ("`checkpoint`", "config.json")),
    case("config is a pipe", GENERATE, ("config.json", "regular file"), pipe("config.json")),
    case("config is no JSON", GENERATE, ("config.json", "JSON"), written("config.json", "hello")),
    case("config is a list", GENERATE, ("config.json", "list"), written("config.json", "[1]")),
    case(
        "config without end", GENERATE, ("config.json",), written("config.json", "[" * 200_000)
    ),
    case("text for a number", GENERATE, ("vocab_size", "'2048'"), config(vocab_size="2048")),
    case("layers without end", ("plan", "checkpoint=@"), ("num_hidden_layers", "4096"),
         config(num_hidden_layers=10**9)),
    case("rope of no number", GENERATE, ("rope_theta", "nan"), config(rope_theta=float("nan"))),
    case("integer no float holds", GENERATE, ("rope_theta",), config(rope_theta=10**400)),
    case("dynamic rope", GENERATE, ("rope_scaling", "'dynamic'", "yarn"),
         config(rope_scaling={"rope_type": "dynamic", "factor": 2.0})),
    case("gelu", GENERATE, ("hidden_act", "silu", "'gelu'"), config(hidden_act="gelu")),
    case("window below the context", GENERATE, ("sliding_window", "64"), config(sliding_window=64)),
    case("window as text", GENERATE, ("sliding_window", "'64'"), config(sliding_window="64")),
    case("unknown architecture", GENERATE, ("architectures", "'Foo'", "LlamaForCausalLM"),
         config(architectures=["Foo"])),
    case("architectures of no name", GENERATE, ("architectures",), config(architectures=[[1]])),
    case("awq weights", GENERATE, ("quantization_config", "'awq'"),
         config(quantization_config={"quant_method": "awq", "bits": 4})),
    case("fp8 weights", GENERATE, ("quantization_config.format", "'float-quantized'"),
         config(quantization_config={"quant_method": "compressed-tensors", "config_groups": {"a": {}},
                                     "format": "float-quantized"})),
    case("exporting what was not prepared", ("export", "checkpoint=@", "output=out"),
         ("`checkpoint`", "prepare")),
    case("weights cut off", GENERATE, ("model.safetensors",), cut_off("model.safetensors", 5000)),
    case("weights are a pipe", GENERATE, ("model.safetensors",), pipe("model.safetensors")),
    case("header without end", GENERATE, ("model.safetensors",),
         written("model.safetensors", struct.pack("<Q", 2**63) + b"{}")),
    case("tensor of another size than its bytes", GENERATE, ("model.safetensors",),
         header({"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]})),
    case("int64 weights", GENERATE, ("lm_head.weight", "int64"),
         weight("lm_head.weight", lambda tensor: tensor.long())),
    case("weight of another shape", GENERATE, ("lm_head.weight", "[2048, 64]", "[64, 2048]"),
         weight("lm_head.weight", lambda tensor: tensor.T.contiguous())),
    case("missing weight", GENERATE, ("lacks", UP), weight(UP, lambda _: None)),
    case("NaN to quantize", PREPARE, (UP, "NaN", "modules_to_not_convert"), weight(UP, with_nan)),
    case("no tokenizer", GENERATE, ("tokenizer.model",), removed("tokenizer.model")),
    case("garbage tokenizer", GENERATE, ("tokenizer.model",), written("tokenizer.model", "a" * 99)),
    case("heads that do not divide", (*GENERATE, "parallel.tp=3"), ("`parallel.tp`", "3", "1, 2, 4")),
    case("output that exists", ("prepare", "checkpoint=@", "output=@"), ("`output`", "exists")),
    case("output inside a file", ("prepare", "checkpoint=@", "output=@/config.json/x"),
         ("config.json/x", "Not a directory")),
    case("output of a name too long for what stands beside it",
         ("prepare", "checkpoint=@", "output=" + "a" * 250), ("`output`", "shorter", "250")),
    case("output of another task", (*GENERATE, "output=x"), ("`output`", "generate")),
    case("pattern that matches nothing",
         (*PREPARE, "quant.modules_to_not_convert=[w9]"), ("modules_to_not_convert", "'w9'")),
    case("patterns that match all",
         (*PREPARE, "quant.modules_to_not_convert=['*']"), ("modules_to_not_convert", "'*'")),
    case("pattern while nothing is quantized",
         (*GENERATE, "quant.modules_to_not_convert=[w2]"), ("modules_to_not_convert", "no effect")),
    case("static cache that nobody calibrated",
         (*GENERATE, "quant=rtn_c8", "quant.kvcache_quant_granularity=per_channel"),
         ("c8 static", "needs calibration", "shardrun prepare")),
    case("pattern beside a quantized cache alone",
         (*GENERATE, "quant=rtn_c8", "quant.modules_to_not_convert=[w2]"),
         ("modules_to_not_convert", "no effect")),
    case("scheme of a later version", (*PREPARE, "quant.weight_dtype=int2"), ("'int2'",)),
    case("original that is not there", ("verify", *GENERATE[1:], "verify.original=/no/such"),
         ("`verify.original`", "/no/such")),
    case("prompt beyond the context", prompts("prompt=" + "word " * 500), ("prompt 0", "128")),
    case("dtype of no name", (*GENERATE, "model.torch_dtype="), ("torch_dtype", "float32", "''")),
    case("template of no word", (*EVAL, "eval.template="), ("`eval.template`", "question", "''"),
         written("q.jsonl", QUESTION)),
    case("text field of no name", (*GPTQ, "calibration.data=@/t.jsonl", "calibration.text_field="),
         ("`calibration.data`", "line 1", "with '' (text)"), written("t.jsonl", '{"text": "a b"}')),
    case("held-out file of no text", (*GPTQ, f"calibration.data={TEXTS}",
         "quant.max_perplexity_increase=5", "calibration.held_out=@/t.jsonl"),
         ("`calibration.held_out`", "t.jsonl", "another file"), written("t.jsonl", "\n")),
    case("prompts given twice", (*GENERATE, "prompts=[b]"), ("`prompt`", "`prompts`")),
    case("no prompts", prompts("prompts=[]"), ("`prompts`", "empty")),
    case("file of no prompts", prompts("prompts_file=@/p.txt"), ("p.txt", "no prompt"),
         written("p.txt", "\n \n")),
    case("file that is not UTF-8", prompts("prompts_file=@/p.txt"), ("p.txt", "UTF-8"),
         written("p.txt", b"\xff\xfeH\0")),
    case("endless file", prompts("prompts_file=/dev/zero"), ("/dev/zero", "bytes")),
    case("jsonl line of another form", prompts("prompts_file=@/p.jsonl"), ("line 2", "{\"prompt\""),
         written("p.jsonl", '{"prompt": "a"}\n{"prompt"')),
    case("jsonl with half a character", prompts("prompts_file=@/p.jsonl"), ("prompt 0", "\\ud800"),
         written("p.jsonl", '{"prompt": "\\ud800"}')),
    case("stdin for two", ("eval", "eval.text=-", "eval.questions=-"),
         ("`eval.questions`", "eval.text", "read once")),
    case("jsonl with a long list for an id", prompts("prompts_file=@/p.jsonl"), ("`id`", "[1, 1"),
         written("p.jsonl", '{"prompt": "a", "id": [' + "1," * 5000 + "1]}")),
    case("jsonl with a length of its own", prompts("prompts_file=@/p.jsonl"), ("max_new_tokens",),
         written("p.jsonl", '{"prompt": "a", "max_new_tokens": 5}')),
    case("YAML of an integer nobody can write", ("config=@/c.yaml",), ("c.yaml", "9,002 digits"),
         written("c.yaml", f"parallel: {{tp: 0x{'f' * 9000}}}")),
    case("YAML that would run a command", ("config=@/c.yaml",), ("c.yaml", "python"),
         written("c.yaml", "device: !!python/object/apply:os.system ['touch ran']")),
    case("YAML that unfolds without end", ("config=@/c.yaml",), ("c.yaml", "100,000"),
         written("c.yaml", "prompts:\n- &a [x,x,x,x,x,x,x,x,x]\n"
                 + "".join(f"- &{b} [{','.join(['*' + a] * 9)}]\n"
                           for a, b in zip("abcdefgh", "bcdefghi", strict=True)))),
]  # fmt: skip

SHARDED = [
    case("shard outside its directory", GENERATE, (INDEX, "'../../etc/passwd'"),
         shard_of("lm_head.weight", "../../etc/passwd")),
    case("absolute shard", ("plan", "checkpoint=@"), (INDEX, "'/etc/passwd'"),
         shard_of("lm_head.weight", "/etc/passwd")),
    case("shard of no name", GENERATE, (INDEX, "lm_head.weight", "3"),
         shard_of("lm_head.weight", 3)),
    case("missing shard", GENERATE, ("model-00002-of-00003.safetensors", "missing"),
         removed("model-00002-of-00003.safetensors")),
    case("name that is in no shard", GENERATE, (INDEX, "foo"),
         shard_of("foo", "model-00001-of-00003.safetensors")),
]  # fmt: skip

PREPARED = [
    case("manifest without its mesh", GENERATE, ("manifest.json", "mesh"),
         edited("manifest.json", lambda found: found.pop("mesh"))),
    case("manifest of no ranks", GENERATE, ("manifest.json", "tp is 0"),
         edited("manifest.json", lambda found: found["mesh"].update(tp=0))),
    case("manifest of a later version", GENERATE, ("manifest.json", "version"),
         edited("manifest.json", lambda found: found.update(version=9))),
    case("slices that overlap", GENERATE, ("manifest.json", UP),
         stored(lambda entry: entry["shards"][1].update(slice=[[28, 84], [0, 64]]))),
    case("slices that are no numbers", GENERATE, ("manifest.json", UP),
         stored(lambda entry: entry["shards"][1].update(slice=[[56.0, 112.0], [0, 64]]))),
    case("dtype that is no dtype", GENERATE, ("manifest.json", "'os.system'"),
         stored(lambda entry: entry.update(dtype="os.system"))),
    case("patterns that are no texts", GENERATE, ("manifest.json", "[1]"),
         edited("manifest.json", lambda found: found["scheme"].update(modules_to_not_convert=[1]))),
    case("missing rank", GENERATE, ("rank_1/model.safetensors",),
         removed("rank_1/model.safetensors")),
    case("ranks that changed places", GENERATE, ("rank_0", "rank 0 of 2", "1 of 2"), ranks_swapped),
    case("config of another model", GENERATE, ("mlp.down_proj", "config.json"),
         config(intermediate_size=128)),
    case("another scheme than the prepared", (*GENERATE, "quant=rtn_a16w8",
         "quant.modules_to_not_convert=[]"), ("w8a16", "`quant`")),
]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A checkpoint of each form, to be copied."""
    folder = tmp_path_factory.mktemp("sources")
    write_checkpoint(folder / "plain")
    write_checkpoint(folder / "sharded", num_files=3)
    words = ("quant=rtn_a16w8", "parallel.tp=2", f"output={folder / 'prepared'}")
    assert main(["prepare", f"checkpoint={folder / 'plain'}", *words]) == 0
    return folder


@pytest.fixture
def refuse(sources, tmp_path, monkeypatch, capsys):
    """Run a command line on a damaged copy; the sentence, after all that must hold of every one."""
    # A forkserver that imports torch is for ranks that will never be.
    monkeypatch.setattr("launcher.ranks.workers.preload_torch", lambda: None)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def run(
        form: str, words: tuple[str, ...], says: tuple[str, ...], damage: Damage | None
    ) -> None:
        damaged(sources / form, tmp_path / "checkpoint", damage)
        before = contents(tmp_path)
        status = main([word.replace("@", str(tmp_path / "checkpoint")) for word in words])
        out, err = capsys.readouterr()
        check_refusal(status, out, err, says)
        assert contents(tmp_path) == before

    return run


def damaged(source: Path, path: Path, damage: Damage | None) -> None:
    shutil.copytree(source, path)
    if damage:
        damage(path)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder with its size and time of writing."""
    states = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): (state.st_size, state.st_mtime_ns) for path, state in states.items()}


def check_refusal(status: int, out: str, err: str, says: tuple[str, ...]) -> None:
    assert (status, out) == (2, ""), err
    assert err.startswith("shardrun: ")
    assert err.endswith((".\n", "?\n"))
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert len(err) < 1000
    for word in says:
        assert word in err


@pytest.mark.parametrize(("words", "says", "damage"), COMMAND_LINES)
def test_bad_command_line_is_refused(refuse, words, says, damage):
    refuse("plain", words, says, damage)


@pytest.mark.parametrize(("words", "says", "damage"), DAMAGED)
def test_bad_file_is_refused(refuse, words, says, damage):
    refuse("plain", words, says, damage)


@pytest.mark.parametrize(("words", "says", "damage"), SHARDED)
def test_bad_index_is_refused(refuse, words, says, damage):
    refuse("sharded", words, says, damage)


@pytest.mark.parametrize(("words", "says", "damage"), PREPARED)
def test_bad_prepared_directory_is_refused(refuse, words, says, damage):
    refuse("prepared", words, says, damage)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a host without a GPU")
def test_cuda_without_a_gpu_is_refused_before_a_rank_starts(refuse):
    refuse("plain", (*GENERATE, "device=cuda"), ("`device`", "0 GPUs", "device=cpu."), None)


@pytest.mark.parametrize(
    ("words", "says", "damage"),
    [
        case("misspelt task", ("generat",), ("'generat'", "generate")),
        case("config is a list", GENERATE, ("config.json", "list"), written("config.json", "[1]")),
        case("NaN to quantize", PREPARE, (UP, "NaN"), weight(UP, with_nan)),
        case("stdin is not UTF-8", prompts("prompts_file=-"), ("`prompts_file` -", "UTF-8")),
    ],
)
def test_process_ends_with_status_2_and_writes_nothing(sources, tmp_path, words, says, damage):
    damaged(sources / "plain", tmp_path / "checkpoint", damage)
    (tmp_path / "cwd").mkdir()
    before = contents(tmp_path)
    process = subprocess.run(
        [sys.executable, "-m", "launcher", *(word.replace("@", "../checkpoint") for word in words)],
        cwd=tmp_path / "cwd",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input=b"\xff\xfe",
        capture_output=True,
        timeout=120,
    )
    check_refusal(process.returncode, process.stdout.decode(), process.stderr.decode(), says)
    assert contents(tmp_path) == before
