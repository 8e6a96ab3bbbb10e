"""From the command to the first token, as a multiple of `python -c "import torch"`.

    python scripts/bench_start.py [RUNS]

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


def import_torch_s() -> float:
    """Wall time of a process that imports torch and ends."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - start


def first_token_report(folder: Path) -> dict[str, float]:
    """report.json of `shardrun` without arguments."""
    command = [sys.executable, "-m", "launcher", f"run_root={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (report,) = folder.glob("*/*/report.json")
    values: dict[str, float] = json.loads(report.read_text())
    return values


def main(num_runs: int) -> None:
    print("import torch s   before load s   load s   first token s   ratio")
    ratios = []
    for _ in range(num_runs):
        alone = import_torch_s()
        with tempfile.TemporaryDirectory() as folder:
            report = first_token_report(Path(folder))
        ratios.append(report["first_token_s"] / alone)
        print(
            f"{alone:14.2f} {report['before_load_s']:15.2f} {report['load_s']:8.2f}"
            f" {report['first_token_s']:15.2f} {ratios[-1]:7.2f}"
        )
    print(f"median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
