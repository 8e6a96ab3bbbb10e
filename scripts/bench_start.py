"""From the command to the first token, as a multiple of `python -c "import torch"`, stage by stage.

    python scripts/bench_start.py [RUNS] [key=value …]

The two are run in turn, so that a noisy machine slows both; the ratio is taken pair by pair.
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
    print("import torch s   first token s   ratio")
    ratios, starts = [], []
    for _ in range(num_runs):
        alone = import_torch_s()
        report = start_report(arguments)
        ratios.append(report["first_token_s"] / alone)
        starts.append(report["start"])
        print(f"{alone:14.2f} {report['first_token_s']:15.2f} {ratios[-1]:7.2f}")
    print(f"median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print("median seconds of each stage:")
    for stage in starts[0]:
        print(f"  {stage:22} {statistics.median(start[stage] for start in starts):7.3f}")


if __name__ == "__main__":
    words = sys.argv[1:]
    runs = int(words.pop(0)) if words and words[0].isdecimal() else 5
    main(runs, words)
