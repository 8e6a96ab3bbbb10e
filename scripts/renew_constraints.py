#!/usr/bin/env python
"""Write tests/constraints.txt anew: the newest version of every package that the tests install.

Run it with the oldest Python that the project takes: what is the newest there installs on later ones
too. Nothing is installed. Pass the tests with the new versions before they are committed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 11)
HEADER = """\
# What the tests are known to pass with: every package that `pip install -e '.[dev]'` brings.
# scripts/renew_constraints.py writes this file. Packages of CUDA are absent: the build of torch
# that a platform takes brings its own.
"""
CUDA = re.compile(r"nvidia-|cuda-|triton")


def main() -> int:
    if sys.version_info[:2] != OLDEST:
        said = "renew_constraints.py must run under Python {}.{}, but this is {}.{}."
        print(said.format(*OLDEST, *sys.version_info), file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    report = subprocess.run(
        [*command, "--report", "-", f"{ROOT}[dev]"], check=True, stdout=subprocess.PIPE
    ).stdout
    pins = {}
    for package in json.loads(report)["install"]:
        name = re.sub("[-_.]+", "-", package["metadata"]["name"]).lower()
        # "2.13.0+cpu" is a build of 2.13.0; which one is the platform's choice.
        pins[name] = package["metadata"]["version"].partition("+")[0]
    del pins["shardrun"]
    lines = [f"{name}=={pins[name]}\n" for name in sorted(pins) if not CUDA.match(name)]
    (ROOT / "tests" / "constraints.txt").write_text(HEADER + "".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
