"""shardrun-predict and scripts/run_llama2_predict.sh: what becomes of MindFormers' arguments.

The tests go through the script, and `shardrun` itself is replaced: it only says how it was called.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.config import compose

SCRIPT = Path(__file__).parent.parent / "scripts" / "run_llama2_predict.sh"
MINDFORMERS_PROMPTS = ["I love Beijing, because", "LLaMA is a", "Huawei is a company that"]
RECORDER = """
import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "environ": dict(os.environ)}))
"""
# shardrun-predict with RUN in place of `shardrun`: a function of its words that returns a status.
PROGRAM = """
import json, os, signal, sys, time
from launcher.mindformers import predict

def record(words):
    print(json.dumps({"arguments": words, "environ": dict(os.environ)}))
    return 0

predict.run_command = RUN
sys.exit(predict.main())
"""
NASTY = [
    "one, two, three",
    'it\'s "quoted"',
    "key=value",
    "f(x) [y] {z: 1}",
    "${oc.env:HOME} ${ $HOME $(id) `id`",
    "first line\nsecond line\n",
    "C:\\path\\",
    "\\'",
    "日本 ✓ é",
    "",
    " ",
    "null",
    "-n",
    "--help",
    "*",
    "#!%@~",
]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the script with `shardrun` replaced by a recorder, and no MindSpore variable set."""
    bin_dir = tmp_path / "bin"
    write_predict(bin_dir, "record")
    (tmp_path / "predict.yaml").write_text("parallel: {tp: 4}\n")
    (tmp_path / "weights").mkdir()

    def run_script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPT), *arguments],
            env=environment(bin_dir) | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run_script


def write_program(path: Path, source: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{source}")
    path.chmod(0o755)


def write_predict(bin_dir: Path, run: str) -> None:
    write_program(bin_dir / "shardrun-predict", PROGRAM.replace("RUN", run))


def environment(bin_dir: Path) -> dict[str, str]:
    """The recorder first; then an interpreter called python, and the system's tools."""
    path = os.pathsep.join([str(bin_dir), str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("MS_") and key not in ("RANK_ID", "RANK_SIZE", "DEVICE_ID")
    }
    return kept | {"PATH": path}


def record(finished: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert finished.returncode == 0, finished.stderr
    recorded = json.loads(finished.stdout)
    assert isinstance(recorded, dict)
    return recorded


def arguments(finished: subprocess.CompletedProcess[str]) -> list[str]:
    return list(record(finished)["arguments"])


def prompts(finished: subprocess.CompletedProcess[str]) -> list[str] | None:
    """The prompts as shardrun itself reads them."""
    words = [word for word in arguments(finished) if word.startswith("prompt")]
    config = compose(words)
    return [config.prompt] if config.prompt is not None else config.prompts


def test_single_generates_on_one_rank(run: Run) -> None:
    words = arguments(run("single", "predict.yaml", "weights"))
    assert words[:4] == [
        "generate",
        "config=predict.yaml",
        "checkpoint=weights",
        "parallel.tp=1",
    ]


def test_parallel_generates_on_device_num_ranks(run: Run) -> None:
    assert "parallel.tp=8" in arguments(run("parallel", "predict.yaml", "weights", "8"))


@pytest.mark.parametrize("words", [("single",), ("parallel", "2")])
def test_without_a_prompt_the_three_of_mindformers_are_run(
    run: Run, words: tuple[str, ...]
) -> None:
    finished = run(words[0], "predict.yaml", "weights", *words[1:])
    assert prompts(finished) == MINDFORMERS_PROMPTS


def test_shardrun_reads_the_files_that_were_named(run: Run, tmp_path: Path) -> None:
    words = arguments(run("parallel", str(tmp_path / "predict.yaml"), "weights", "2", "Hello"))
    config = compose([f"task={words[0]}", *words[1:]])
    assert (config.task.name, config.checkpoint, config.parallel.tp, config.prompt) == (
        "generate",
        "weights",
        2,
        "Hello",
    )


def test_single_drops_what_mindspore_left_in_the_shell_and_names_it(run: Run) -> None:
    stale = {"MS_WORKER_NUM": "8", "MS_ROLE": "MS_WORKER", "RANK_ID": "3", "RANK_SIZE": "8"}
    finished = run("single", "predict.yaml", "weights", **stale, DEVICE_ID="3", MASTER_PORT="1")
    seen = record(finished)["environ"]
    assert seen.keys().isdisjoint({*stale, "DEVICE_ID"})
    assert seen["MASTER_PORT"] == "1"
    assert all(name in finished.stderr for name in [*stale, "DEVICE_ID"])
    assert finished.stderr.count("\n") == 1


def test_single_is_silent_where_mindspore_left_nothing(run: Run) -> None:
    assert run("single", "predict.yaml", "weights").stderr == ""


def test_parallel_leaves_ms_worker_num_to_the_program(run: Run) -> None:
    finished = run("parallel", "predict.yaml", "weights", "2", MS_WORKER_NUM="4")
    assert record(finished)["environ"]["MS_WORKER_NUM"] == "4"
    assert finished.stderr == ""


@pytest.mark.parametrize("device_num", ["1", "8", "0", ""])
def test_single_does_not_use_device_num(run: Run, device_num: str) -> None:
    finished = run("single", "predict.yaml", "weights", device_num, "Hello")
    assert "parallel.tp=1" in arguments(finished)
    assert prompts(finished) == ["Hello"]


def test_single_takes_a_fourth_argument_that_is_no_number_as_a_prompt(run: Run) -> None:
    assert prompts(run("single", "predict.yaml", "weights", "8 bits", "9")) == ["8 bits", "9"]


def test_single_takes_a_number_after_device_num_as_a_prompt(run: Run) -> None:
    assert prompts(run("single", "predict.yaml", "weights", "1", "42")) == ["42"]


@pytest.mark.parametrize("text", NASTY)
def test_one_prompt_arrives_as_it_is(run: Run, text: str) -> None:
    assert prompts(run("parallel", "predict.yaml", "weights", "2", text)) == [text]


def test_several_prompts_arrive_as_they_are(run: Run) -> None:
    assert prompts(run("parallel", "predict.yaml", "weights", "2", *NASTY)) == NASTY


def test_equal_command_lines_give_equal_ones_on_every_rank(run: Run) -> None:
    # srun and mpirun start the script once a rank, and shardrun refuses ranks that differ.
    first, second = (run("parallel", "predict.yaml", "weights", "2", *NASTY) for _ in range(2))
    assert arguments(first) == arguments(second)


def test_paths_hold_spaces_and_signs(run: Run, tmp_path: Path) -> None:
    config, weights = tmp_path / "Llama (2), 13b=x.yaml", tmp_path / "my weights ${x}"
    config.write_text("device: cpu\n")
    weights.mkdir()
    words = arguments(run("single", str(config), str(weights), "Hello"))
    assert words[1:3] == [f"config={config}", f"checkpoint={weights}"]
    assert compose(words[1:]).checkpoint == str(weights)


def test_a_checkpoint_may_be_one_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "llama2.ckpt").touch()
    assert "checkpoint=llama2.ckpt" in arguments(run("single", "predict.yaml", "llama2.ckpt"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "PARALLEL must be single or parallel, but is ''"),
        (("distributed", "predict.yaml", "weights", "2"), "but is 'distributed'"),
        (("single",), "single needs CONFIG_PATH and CKPT_PATH"),
        (("parallel", "predict.yaml"), "parallel needs CONFIG_PATH and CKPT_PATH"),
        (("single", "gone.yaml", "weights"), "CONFIG_PATH must be a YAML file, but 'gone.yaml'"),
        (("single", "weights", "weights"), "CONFIG_PATH must be a YAML file, but 'weights'"),
        (("single", "predict.yaml", "gone"), "CKPT_PATH must exist, but 'gone'"),
        (("single", "predict.yaml", ""), "CKPT_PATH must exist, but ''"),
        (
            ("parallel", "predict.yaml", "weights"),
            "DEVICE_NUM must be a positive integer, but is ''",
        ),
        (("parallel", "predict.yaml", "weights", ""), "DEVICE_NUM must be a positive integer"),
        (("parallel", "predict.yaml", "weights", "two"), "but is 'two'"),
        (("parallel", "predict.yaml", "weights", "0"), "but is '0'"),
        (("parallel", "predict.yaml", "weights", "-2"), "but is '-2'"),
        (("parallel", "predict.yaml", "weights", "2.5"), "but is '2.5'"),
    ],
)
def test_a_wrong_command_line_is_refused_in_a_sentence(
    run: Run, words: tuple[str, ...], sentence: str
) -> None:
    finished = run(*words)
    said = finished.stderr.splitlines()
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert len(said) == 2
    assert sentence in said[0]
    assert said[0].endswith(".")
    assert said[1].startswith("usage: shardrun-predict PARALLEL CONFIG_PATH CKPT_PATH")


def test_help_says_what_each_argument_means(run: Run) -> None:
    finished = run("--help")
    assert finished.returncode == 0
    assert all(word in finished.stdout for word in ("single", "parallel", "DEVICE_NUM", "PROMPT"))


def test_the_exit_status_is_the_programs(run: Run, tmp_path: Path) -> None:
    write_predict(tmp_path / "bin", "lambda words: 7")
    assert run("single", "predict.yaml", "weights").returncode == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("texts", [["one"], ["one", "two"]])
def test_a_signal_reaches_the_program(
    run: Run, tmp_path: Path, number: signal.Signals, texts: list[str]
) -> None:
    wait = (
        f"lambda words: (signal.signal({number.value}, lambda *_: sys.exit(42)), "
        "print('ready', flush=True), time.sleep(60))"
    )
    write_predict(tmp_path / "bin", wait)
    process = subprocess.Popen(
        [str(SCRIPT), "single", "predict.yaml", "weights", *texts],
        env=environment(tmp_path / "bin"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(timeout=30) == 42


def test_a_checkout_runs_without_being_installed(run: Run, tmp_path: Path) -> None:
    finished = run("single", "predict.yaml", "weights", "Hello", PATH=bare_path(tmp_path))
    recorded = record(finished)
    module = ["-P", "-m", "launcher.mindformers.predict"]
    assert recorded["arguments"] == [*module, "single", "predict.yaml", "weights", "Hello"]
    assert recorded["environ"]["PYTHONPATH"].split(os.pathsep)[0] == str(SCRIPT.parent.parent)


def test_a_checkout_runs_where_the_guide_has_the_script(run: Run, tmp_path: Path) -> None:
    guide = tmp_path / "scripts" / "examples" / "llama2"
    guide.mkdir(parents=True)
    (guide / SCRIPT.name).symlink_to(SCRIPT)
    done = subprocess.run(
        [str(guide / SCRIPT.name), "single", "predict.yaml", "weights"],
        env=environment(tmp_path) | {"PATH": bare_path(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert record(done)["environ"]["PYTHONPATH"].split(os.pathsep)[0] == str(SCRIPT.parent.parent)


def test_a_path_without_python_is_refused_in_a_sentence(run: Run, tmp_path: Path) -> None:
    path = bare_path(tmp_path)
    Path(path, "python").unlink()
    finished = run("single", "predict.yaml", "weights", PATH=path)
    assert finished.returncode == 2
    assert "python must be on PATH" in finished.stderr


def bare_path(tmp_path: Path) -> str:
    """A PATH with a shell, a recorder called python, and no shardrun."""
    directory = tmp_path / "bare"
    write_program(directory / "python", RECORDER)
    for name in ("bash", "dirname", "readlink"):
        found = shutil.which(name)
        assert found
        (directory / name).symlink_to(found)
    return str(directory)
