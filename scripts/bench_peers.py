"""Our speed against llama.cpp, CTranslate2 and transformers: one shape, random weights, in turn.

    python scripts/bench_peers.py model=llama2_13b model.num_hidden_layers=8 \\
        --llama-bench PATH --peer-python PATH --rounds 3

Words of the form key=value go to `shardrun bench` (quant=rtn_a16w8 and an int8 lm_head unless said
otherwise, as the peers quantize theirs). Each round runs ours and every peer once, one after the
other, so that a noisy machine slows all; a ratio is taken round by round, and its median reported.
All of them use as many threads as there are cores. What is not installed is named and left out.

    ours           shardrun bench, once for each of --tp
    llama.cpp      llama-bench, Q8_0: int8 with a scale for 32 values, lm_head too
    CTranslate2    int8: w8a8, per channel, lm_head too
    transformers   bfloat16, nothing quantized
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "scripts" / "peers"
sys.path.insert(0, str(ROOT))

from launcher.config import compose  # noqa: E402
from launcher.resolve import model_overrides  # noqa: E402
from launcher.table import print_table  # noqa: E402

OURS = ("quant=rtn_a16w8", "quant.modules_to_not_convert=[]")
# Tokens/s by what was measured: "decode", "prefill 128", …
Speeds = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """What every contender is given."""

    words: tuple[str, ...]
    shape: dict[str, Any]
    prompts: tuple[int, ...]
    new_tokens: int
    threads: int
    folder: Path
    python: str
    llama_bench: str | None
    timeout_s: float

    def run(self, *command: object) -> str:
        """stdout of a process; a RuntimeError with the end of its stderr if it fails."""
        done = subprocess.run(
            list(map(str, command)),
            cwd=self.folder,
            env={**_without_threads(os.environ), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=self.timeout_s,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]}: {done.stderr.strip()[-800:]}")
        return done.stdout

    def script(self, name: str, *words: object) -> str:
        return self.run(self.python, PEERS / name, *words)

    def has(self, *modules: str) -> str:
        """What the peers' Python lacks, as a reason; empty if nothing."""
        missing = [name for name in modules if not _imports(self.python, name)]
        return f"{', '.join(missing)} cannot be imported by {self.python}" if missing else ""


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
        reason: why it cannot run; empty if it can.
        prepare: writes its model.
    """

    name: str
    reason: str
    prepare: Callable[[], object]
    measure: Callable[[], Speeds]


def main() -> int:
    options, words = _options()
    # The models are gigabytes: they are removed also when we are told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(dir=options.work_dir, prefix="peers-") as folder:
        setting = _setting(options, words, Path(folder))
        wanted = _contenders(setting, options.tp)
        able = _prepared([item for item in wanted if item.name not in options.without])
        rounds: list[dict[str, Speeds]] = []
        for index in range(options.rounds):
            rounds.append(_round(able))
            print(f"round {index + 1}: {json.dumps(rounds[-1])}", flush=True)
    _print_ratios(rounds)
    return 0


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-bench", default=shutil.which("llama-bench"))
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--without", nargs="+", default=[], help="peers to leave out, by name")
    parser.add_argument("--timeout", type=float, default=900.0, help="of one run, in seconds")
    parser.add_argument("--work-dir", help="where models are written, and removed; default: /tmp")
    return parser.parse_known_args()


def _setting(options: argparse.Namespace, words: list[str], folder: Path) -> Setting:
    config = compose(["task=bench", *words])
    shape = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, **model_overrides(config)}
    if not shape.get("hidden_size") or config.model.rope_scaling or config.model.head_dim:
        raise SystemExit("the peers are given a plain Llama shape: model=llama2_13b, or its like")
    return Setting(
        words=(*OURS, *words),
        shape=shape,
        prompts=tuple(options.prompts),
        new_tokens=options.new_tokens,
        threads=len(os.sched_getaffinity(0)),
        folder=folder,
        python=options.peer_python,
        llama_bench=options.llama_bench,
        timeout_s=options.timeout,
    )


def _contenders(setting: Setting, sizes: list[int]) -> list[Contender]:
    def ours(tp: int) -> Contender:
        return Contender(f"ours tp={tp}", "", lambda: None, lambda: _ours(setting, tp))

    gguf, ct2 = setting.folder / "model.gguf", setting.folder / "ctranslate2"
    shape = json.dumps(setting.shape)
    no_bench = "" if setting.llama_bench else "no llama-bench on PATH, nor --llama-bench"
    return [
        *map(ours, sizes),
        Contender(
            "llama.cpp",
            no_bench or setting.has("gguf"),
            lambda: setting.script("gguf_q8.py", shape, gguf),
            lambda: _llama_cpp(setting, gguf),
        ),
        Contender(
            "CTranslate2",
            setting.has("ctranslate2"),
            lambda: setting.script("ctranslate2_int8.py", "write", shape, ct2),
            lambda: _scripted(setting, "ctranslate2_int8.py", "measure", shape, ct2),
        ),
        Contender(
            "transformers",
            setting.has("torch", "transformers"),
            lambda: None,
            lambda: _scripted(setting, "transformers_bf16.py", shape),
        ),
    ]


def _prepared(contenders: list[Contender]) -> list[Contender]:
    able = []
    for contender in contenders:
        if contender.reason:
            print(f"without {contender.name}: {contender.reason}", flush=True)
            continue
        contender.prepare()
        able.append(contender)
    return able


def _round(contenders: list[Contender]) -> dict[str, Speeds]:
    """Everyone once; one that fails is said, and has no figures in this round."""
    found = {}
    for contender in contenders:
        try:
            found[contender.name] = contender.measure()
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"{contender.name} failed: {error}", flush=True)
    return found


def _ours(setting: Setting, tp: int) -> Speeds:
    """`shardrun bench`; its decode is that after the first prompt length."""
    with tempfile.TemporaryDirectory(dir=setting.folder) as run_root:
        setting.run(
            sys.executable, "-m", "launcher", "bench", *setting.words, f"parallel.tp={tp}",
            "bench.batch_sizes=[1]", f"bench.prompt_lengths={list(setting.prompts)}",
            f"bench.new_tokens={setting.new_tokens}", "bench.repeats=1", "bench.plot=false",
            f"run_root={run_root}",
        )  # fmt: skip
        (path,) = Path(run_root).glob("*/*/result.jsonl")
        records = [json.loads(line) for line in path.read_text().splitlines()]
    speeds = {
        f"prefill {record['prompt_length']}": record["tokens_per_s"]
        for record in records
        if record["phase"] == "prefill"
    }
    decode = next(record for record in records if record["phase"] == "decode")
    return {**speeds, "decode": decode["tokens_per_s"]}


def _llama_cpp(setting: Setting, model: Path) -> Speeds:
    """Twice: its depth applies to prompts as well."""
    common = (setting.llama_bench, "-m", model, "-t", setting.threads, "-r", 1, "-o", "json")
    lengths = ",".join(map(str, setting.prompts))
    prefills = json.loads(setting.run(*common, "-p", lengths, "-n", 0))
    decode = json.loads(
        setting.run(*common, "-p", 0, "-n", setting.new_tokens, "-d", setting.prompts[0])
    )
    speeds = {f"prefill {item['n_prompt']}": item["avg_ts"] for item in prefills}
    return {**speeds, "decode": decode[0]["avg_ts"]}


def _scripted(setting: Setting, name: str, *words: object) -> Speeds:
    said = setting.script(name, *words, setting.threads, list(setting.prompts), setting.new_tokens)
    found = json.loads(said.splitlines()[-1])
    prefills = {f"prefill {length}": speed for length, speed in found["prefill"].items()}
    return {**prefills, "decode": found["decode"]}


def _print_ratios(rounds: list[dict[str, Speeds]]) -> None:
    """Medians of the speeds, and of our best size's over each peer's."""
    names = list(dict.fromkeys(name for found in rounds for name in found))
    columns = list(dict.fromkeys(key for found in rounds for name in found for key in found[name]))
    rows: list[tuple[str, ...]] = [("tokens/s", *columns)]
    for name in names:
        speeds = [[found[name][column] for found in rounds if name in found] for column in columns]
        rows.append((name, *(f"{median(values):.1f}" for values in speeds)))
    print_table(rows)
    ratios: list[tuple[str, ...]] = [("ours, the best tp, over", *columns)]
    for name in names:
        if not name.startswith("ours"):
            ratios.append((name, *(_ratio(rounds, name, column) for column in columns)))
    print()
    print_table(ratios)


def _ratio(rounds: list[dict[str, Speeds]], name: str, column: str) -> str:
    """Of the rounds in which both ran: the median, and the least to the most."""
    found = [
        max(speeds[column] for ours, speeds in each.items() if ours.startswith("ours"))
        / each[name][column]
        for each in rounds
        if name in each and any(ours.startswith("ours") for ours in each)
    ]
    return f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else "-"


def _without_threads(variables: Mapping[str, str]) -> dict[str, str]:
    """Everyone is told its threads; a variable of the shell would hold for some."""
    return {key: value for key, value in variables.items() if key != "OMP_NUM_THREADS"}


def _imports(python: str, module: str) -> bool:
    done = subprocess.run([python, "-c", f"import {module}"], capture_output=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
