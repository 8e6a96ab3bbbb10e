"""The commands of MindFormers' guide on quantization, character by character, up to its lines of text.

Its shipped YAML files have the demo model's sizes here, and the .ckpt its weights as MindFormers would
have converted them: float16, their names, an lm_head and a kv head for each head.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from launcher.resolve import DEMO
from launcher.text import open_tokenizer
from tests.mindspore_checkpoints import to_mindformers, write_ckpt
from tests.test_config_file import PREDICT, PTQ, RTN, SMOOTH_QUANT

ROOT = Path(__file__).parents[1]
SIZES = {
    "hidden_size": 256, "num_layers": 4, "num_heads": 8, "vocab_size": 2048, "multiple_of": 1024,
    "seq_length": 512, "max_position_embedding": 512, "max_decode_length": 64,
}  # fmt: skip
TEXT = [
    f"'text_generation_text': [{text}]"
    for text in (
        "I love Beijing, because it is a city that has old palaces and wide streets.",
        "LLaMA is a language model that reads a text and writes the next word.",
        "Huawei is a company that makes phones and network equipment.",
    )
]
# What the user calls the two programs.
SCRIPTS = {
    "Q": "python example/ptq/quant_ckpt.py",
    "P": "bash scripts/examples/llama2/run_llama2_predict.sh",
}
CONSOLE = {"Q": "shardrun-quant-ckpt", "P": "shardrun-predict"}
QUANTIZE = "$Q -c configs/llama2/predict_llama2_13b.yaml -s boolq/dev.jsonl -t boolq"
COPY = """
mkdir tutorial
cp output/NAME_ckpt/rank_0/APPROACH.ckpt tutorial/llama2_13b.ckpt
cp configs/llama2/predict_llama2_13b_FILE.yaml tutorial
"""
SINGLE = "$P single tutorial/predict_llama2_13b_FILE.yaml tutorial/llama2_13b.ckpt"
PARALLEL = "$P parallel tutorial/predict_llama2_13b_FILE.yaml tutorial/llama2_13b.ckpt 2"
# The flags behind QUANTIZE, Golden Stick's name of the result, and of the shipped YAML.
FLOWS = [
    ("-q rtn-a16w8", "rtn-a16w8", "rtn"),
    ("-q smooth_quant", "smooth_quant", "smooth_quant"),
    ("-q ptq -w int8 -a int8 -k int8 -o smooth -b w2", "ptq_smooth_a8w8c8", "ptq"),
]


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user of the guide stands: the shipped files, the downloads, and the scripts."""
    here = tmp_path_factory.mktemp("guide")
    write_ckpt(here / "download" / "llama2-13b-fp16.ckpt", demo_weights())
    (here / "download" / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    (here / "configs" / "llama2").mkdir(parents=True)
    write_yaml(
        here, "", use_parallel=True, parallel_config={"data_parallel": 8, "model_parallel": 1}
    )
    for name, block in (("_rtn", RTN), ("_smooth_quant", SMOOTH_QUANT), ("_ptq", PTQ)):
        write_yaml(here, name, block, load_checkpoint="")
    (here / "boolq").mkdir()
    with (here / "boolq" / "dev.jsonl").open("w") as file:
        for at, passage in enumerate((DEMO / "calibration.txt").read_text().split("\n\n")[:24]):
            question = {"question": f"is it so {at}", "answer": True, "passage": passage}
            file.write(json.dumps(question) + "\n")
    for name, target in (
        ("example/ptq/quant_ckpt.py", "quant_ckpt.py"),
        ("scripts/examples/llama2/run_llama2_predict.sh", "run_llama2_predict.sh"),
    ):
        (here / name).parent.mkdir(parents=True)
        (here / name).symlink_to(ROOT / "scripts" / target)
    return here


def demo_weights() -> dict[str, torch.Tensor]:
    weights = load_file(DEMO / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    # "LLaMA is a" goes on with `language` or `large` by 0.006 of a logit: less than bfloat16 rounds by.
    weights["lm_head.weight"][open_tokenizer(DEMO).encode("large")[-1]] *= 0.9
    for name, tensor in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = tensor.unflatten(0, (4, 32)).repeat_interleave(2, 0)
            weights[name] = heads.flatten(0, 1)
    return to_mindformers({name: tensor.half() for name, tensor in weights.items()})


def write_yaml(here: Path, name: str, quantization: str = "", **top: Any) -> None:
    """configs/llama2/predict_llama2_13b{name}.yaml."""
    values = yaml.safe_load(PREDICT)
    values["load_checkpoint"] = str(here / "download" / "llama2-13b-fp16.ckpt")
    values["processor"]["tokenizer"]["vocab_file"] = str(here / "download" / "tokenizer.model")
    values["model"]["model_config"] |= SIZES
    if quantization:
        values["model"]["model_config"]["quantization_config"] = yaml.safe_load(quantization)
    for key, value in top.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    path = here / "configs" / "llama2" / f"predict_llama2_13b{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def type_in(here: Path, folder: Path, called: dict[str, str], *lines: str) -> str:
    """What the shell prints for lines that are typed in a copy of where the user stands."""
    folder.mkdir(exist_ok=True)
    for item in here.iterdir():
        if not (folder / item.name).is_symlink():
            (folder / item.name).symlink_to(item)
    environ = {key: value for key, value in os.environ.items() if not key.startswith("MS_")}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    text = "\n".join(["set -e", *lines]).replace("$Q", called["Q"]).replace("$P", called["P"])
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=folder, env=environ, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def texts(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("'text_generation_text'")]


@pytest.mark.parametrize("called", [SCRIPTS, CONSOLE], ids=["scripts", "console"])
def test_the_guides_commands_give_its_three_lines(
    guide: Path, tmp_path: Path, called: dict[str, str]
) -> None:
    log = tmp_path / "log_rtn_a16w8_quant"
    copy = COPY.replace("NAME", "rtn-a16w8").replace("APPROACH", "rtn-a16w8").replace("FILE", "rtn")
    type_in(guide, tmp_path, called, f"{QUANTIZE} -q rtn-a16w8 > {log} 2>&1", copy)
    for line in (SINGLE, PARALLEL):
        printed = type_in(guide, tmp_path, called, line.replace("FILE", "rtn"))
        assert sorted(texts(printed)) == sorted(TEXT)
    following = log.read_text().splitlines()[-1]
    words = ["single", "configs/llama2/predict_llama2_13b.yaml", "output/llama2_13b_rtn-a16w8_ckpt"]
    assert shlex.split(following)[-3:] == words
    assert following.startswith("next: ")
    printed = type_in(guide, tmp_path, called, following.removeprefix("next: "))
    assert sorted(texts(printed)) == sorted(TEXT)


@pytest.mark.parametrize(("flags", "name", "file"), FLOWS[1:])
def test_other_approaches_go_the_same_way(
    guide: Path, tmp_path: Path, flags: str, name: str, file: str
) -> None:
    approach = flags.split()[1]
    copy = COPY.replace("NAME", name).replace("APPROACH", approach).replace("FILE", file)
    type_in(guide, tmp_path, CONSOLE, f"{QUANTIZE} {flags}", copy)
    single, parallel = (
        type_in(guide, tmp_path, CONSOLE, line.replace("FILE", file)) for line in (SINGLE, PARALLEL)
    )
    assert len(texts(single)) == 3
    # Activations of 8 bits: products of ranks are bit for bit those of one.
    assert sorted(texts(parallel)) == sorted(texts(single))
