"""The shipped form of a predict YAML, with its parallel section, and a bare .ckpt: up to the text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.checkpoints import DEMO
from tests.mindspore_checkpoints import to_mindformers, write_ckpt
from tests.test_command import (  # noqa: F401  # launch is a fixture
    TIMEOUT_S,
    launch,
    results,
    run,
    start_mindspore,
)
from tests.test_config_file import PREDICT

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "launcher"]  # fmt: skip
PROMPT = "prompt=Once upon a time"
HEADING = "has keys that are not used"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """predict.yaml as MindFormers ships it, its sizes made the demo's, and DIR/llama.ckpt."""
    folder = tmp_path_factory.mktemp("shipped")
    shape = json.loads((DEMO / "config.json").read_text())
    weights = load_file(DEMO / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights = {name: tensor.half() for name, tensor in weights.items()}
    write_ckpt(folder / "DIR" / "llama.ckpt", to_mindformers(weights))
    values: dict[str, Any] = yaml.safe_load(PREDICT)
    values["use_parallel"] = True
    values["parallel_config"] |= {"data_parallel": 8, "model_parallel": 8, "vocab_emb_dp": True}
    values["processor"]["tokenizer"]["vocab_file"] = str(DEMO / "tokenizer.model")
    values["model"]["model_config"] |= {
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"],
        "n_kv_heads": shape["num_key_value_heads"],
        "vocab_size": shape["vocab_size"],
        "max_position_embedding": shape["max_position_embeddings"],
        "seq_length": shape["max_position_embeddings"],
        "max_decode_length": 24,
        # In 16 bit the order of the ranks' sums may turn a token.
        "compute_dtype": "float32",
    }
    (folder / "predict.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture
def words(shipped: Path) -> list[str]:
    return [
        "task=generate",
        f"config={shipped / 'predict.yaml'}",
        f"checkpoint={shipped / 'DIR' / 'llama.ckpt'}",
        PROMPT,
    ]


@pytest.fixture(scope="module")
def single(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `run_llama2_predict.sh single` gives."""
    folder = tmp_path_factory.mktemp("single")
    script = str(ROOT / "scripts" / "run_llama2_predict.sh")
    line = [script, "single", f"{shipped}/predict.yaml", f"{shipped}/DIR/llama.ckpt", PROMPT[7:]]
    done = run(folder, command=line)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(HEADING) == 1
    assert "one replica of one stage: parallel_config.data_parallel=8" in done.stderr
    assert done.stdout.startswith("'text_generation_text': [Once upon a time")
    return results(folder)


def test_torchrun_runs_the_shipped_yaml_of_8_ranks_on_its_own(
    single: list[dict[str, Any]], words: list[str], tmp_path: Path
) -> None:
    done = run(tmp_path, *words, command=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(HEADING) == 1
    number = "torchrun's number of ranks is 2, and goes before it: parallel_config.model_parallel=8"
    assert number in done.stderr
    assert results(tmp_path) == single


@pytest.mark.parametrize("with_rank_id", [True, False], ids=["RANK_ID", "ranks handed out"])
def test_hand_set_mindspore_variables_run_it_and_one_process_says_what_is_not_used(
    single: list[dict[str, Any]],
    words: list[str],
    launch: Any,  # noqa: F811
    tmp_path: Path,
    with_rank_id: bool,
) -> None:
    started = start_mindspore(launch, tmp_path, 2, *words, with_rank_id=with_rank_id)
    ended = [process.communicate(timeout=TIMEOUT_S) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], ended
    said = "".join(err for _, err in ended)
    assert said.count(HEADING) == 1
    assert "mindspore's number of ranks is 2, and goes before it" in said
    assert results(tmp_path) == single


def test_mindspores_wish_goes_before_the_yaml(
    single: list[dict[str, Any]], words: list[str], tmp_path: Path
) -> None:
    done: subprocess.CompletedProcess[str] = run(tmp_path, *words, MS_WORKER_NUM="2")
    assert done.returncode == 0, done.stderr
    assert "MS_WORKER_NUM is 2, and goes before it" in done.stderr
    assert results(tmp_path) == single


def test_a_rank_of_too_few_ends_at_once_and_names_both_numbers(
    words: list[str], tmp_path: Path
) -> None:
    """It would wait for a peer that nobody starts, for five minutes."""
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    done = run(tmp_path, *words, MS_WORKER_NUM="4", **variables)
    assert done.returncode == 2
    assert "torchrun's number of ranks=2, MS_WORKER_NUM=4" in done.stderr
    assert done.stderr.count("\n") == 1
