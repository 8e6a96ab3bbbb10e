#!/usr/bin/env python3
"""Quality after quantization: the mean and spread over calibration seeds, of several schemes.

    scripts/eval_seeds.py --quant rtn_a16w8 --quant "gptq quant.group_size=32" --seeds 0,1,2 \\
        checkpoint=DIR calibration.data=boolq/dev.jsonl eval.text=wiki.test.raw

Each scheme is prepared once for each seed (once where it is not calibrated), and evaluated. A --quant
is the name after `quant=`, and further words of prepare. The other words are the command's own:
calibration.* are for prepare, eval.* and dtype for eval, and the rest for both. Without a checkpoint
it is the demo model, its texts and its questions. Prints a table; --json FILE keeps every figure.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

# From a checkout that is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from launcher.config import compose
from launcher.questions import DEMO_TEMPLATE
from launcher.resolve import DEMO
from launcher.table import print_table

DEMO_WORDS = (
    f"checkpoint={DEMO}", f"calibration.data={DEMO / 'calibration.txt'}",
    f"calibration.held_out={DEMO / 'held_out.txt'}", f"eval.text={DEMO / 'held_out.txt'}",
    f"eval.questions={DEMO / 'questions.jsonl'}", f"eval.template={DEMO_TEMPLATE}",
)  # fmt: skip
_PREPARE_ALONE, _EVAL_ALONE = ("calibration.", "quant", "seed="), ("eval.", "dtype=")


def shardrun(*words: str) -> None:
    """Run the command; where it fails, so does this one, with what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"shardrun {shlex.join(words)}\n{done.stderr}")


def evaluate(words: Sequence[str], **said: object) -> dict[str, Any]:
    """Of report.json, what one model got."""
    with tempfile.TemporaryDirectory() as folder:
        more = [f"{key}={value}" for key, value in said.items()]
        shardrun("eval", f"run_root={folder}", *words, *more)
        (report,) = Path(folder).glob("*/*/report.json")
        (model,) = json.loads(report.read_text(encoding="utf-8"))["models"]
    return dict(model)


def prepare_and_evaluate(quant: str, seed: int, words: Sequence[str]) -> dict[str, Any]:
    of_eval = [word for word in words if word.startswith(_EVAL_ALONE)]
    of_prepare = [word for word in words if not word.startswith(_EVAL_ALONE)]
    shared = [word for word in of_prepare if not word.startswith((*_PREPARE_ALONE, "checkpoint="))]
    name, *more = shlex.split(quant)
    if not needs_calibration(quant):
        of_prepare = [word for word in of_prepare if not word.startswith("calibration.")]
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "prepared")
        scheme = (f"quant={name}", *more, f"seed={seed}", f"run_root={folder}")
        shardrun("prepare", *of_prepare, *scheme, f"output={output}")
        return evaluate([*shared, *of_eval], checkpoint=output)


def needs_calibration(quant: str) -> bool:
    name, *more = shlex.split(quant)
    return compose([f"quant={name}", *more]).quant.scheme().needs_calibration


def rows(original: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> Iterator[Any]:
    """The cells of the table."""
    yield "quant", "seeds", "perplexity", "change %", "accuracy %", "points"
    for name, models in {"(original)": [original], **found}.items():
        nll = [model["perplexity"]["mean_nll"] for model in models if "perplexity" in model]
        right = [100 * model["questions"]["accuracy"] for model in models if "questions" in model]
        change = [100 * math.expm1(one - original["perplexity"]["mean_nll"]) for one in nll]
        points = [one - 100 * original["questions"]["accuracy"] for one in right]
        columns = ([math.exp(one) for one in nll], 4), (change, 3), (right, 1), (points, 1)
        yield name, str(len(models)), *(spread(values, places) for values, places in columns)


def spread(values: Sequence[float], places: int) -> str:
    """The mean, and the sample standard deviation where there are several."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{places}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{places}f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--quant", action="append", required=True, metavar="NAME [key=value …]")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_intermixed_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    is_demo = not any(word.startswith("checkpoint=") for word in given.words)
    words = [*(DEMO_WORDS if is_demo else ()), *given.words]
    runs = [
        (quant, seed)
        for quant in given.quant
        for seed in (seeds if needs_calibration(quant) else seeds[:1])
    ]
    original = evaluate([word for word in words if not word.startswith(_PREPARE_ALONE)])
    found: dict[str, list[dict[str, Any]]] = {}
    for quant, seed in tqdm(runs, disable=not sys.stderr.isatty()):
        found.setdefault(quant, []).append(prepare_and_evaluate(quant, seed, words))
        if given.json is not None:  # after each, as hours may have gone into them
            kept = {"words": words, "seeds": seeds, "original": original, "quantized": found}
            given.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print_table(list(rows(original, found)))


if __name__ == "__main__":
    main()
