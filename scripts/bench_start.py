"""From the command to the first and the last token, as multiples of `python -c "import torch"`.

    python scripts/bench_start.py [RUNS] [key=value …]

The two are run in turn, so that a noisy machine slows both; the ratios are taken pair by pair. Then the
seconds of each stage up to the first token, and the largest memory of each rank. Without words it is
the demo.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOKENS = ("first", "last")


def import_torch_s() -> float:
    """Wall time of a process that imports torch and ends."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - start


def start_report(arguments: list[str]) -> dict[str, Any]:
    """report.json of `shardrun generate`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "launcher", "generate", f"run_root={folder}", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (report,) = Path(folder).glob("*/*/report.json")
        values: dict[str, Any] = json.loads(report.read_text())
    return values


def main(num_runs: int, arguments: list[str]) -> None:
    print("import torch s   first token s   ratio   last token s   ratio")
    alone, reports = [], []
    for _ in range(num_runs):
        alone.append(import_torch_s())
        reports.append(start_report(arguments))
        first, last = (reports[-1][f"{token}_token_s"] for token in TOKENS)
        ratios = first / alone[-1], last / alone[-1]
        print(f"{alone[-1]:14.2f} {first:15.2f} {ratios[0]:7.2f} {last:14.2f} {ratios[1]:7.2f}")
    for token in TOKENS:
        print(f"{token} token: median ratio {_spread(alone, reports, f'{token}_token_s')}")
    print("median seconds of each stage:")
    for stage in reports[0]["start"]:
        seconds = statistics.median(report["start"][stage] for report in reports)
        print(f"  {stage:22} {seconds:7.3f}")
    print("median of the largest memory of each rank, MB:")
    for rank, peaks in enumerate(zip(*(r["peak_rss_bytes"] for r in reports), strict=True)):
        print(f"  rank {rank}: {statistics.median(peaks) / 1e6:.0f}")


def _spread(alone: list[float], reports: list[dict[str, Any]], key: str) -> str:
    """The median of the pairs' ratios, the least and the largest."""
    ratios = [report[key] / each for each, report in zip(alone, reports, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    words = sys.argv[1:]
    runs = int(words.pop(0)) if words and words[0].isdecimal() else 5
    main(runs, words)
