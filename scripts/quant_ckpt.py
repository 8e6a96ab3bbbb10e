#!/usr/bin/env python3
"""shardrun-quant-ckpt from a checkout, installed or not: Golden Stick's command line, for shardrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import launcher
from launcher.golden_stick.program import main

if __name__ == "__main__":
    # The processes that it starts must find what was found here.
    found = str(Path(str(launcher.__file__)).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [found, os.getenv("PYTHONPATH")]))
    predict = os.path.relpath(Path(__file__).resolve().with_name("run_llama2_predict.sh"))
    sys.exit(main(predict=("bash", predict)))
