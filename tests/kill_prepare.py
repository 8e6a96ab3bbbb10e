"""Kill a prepare at random moments; each time the next one must end with the same bytes.

python tests/kill_prepare.py COUNT [DIRECTORY]
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from tests.checkpoints import write_checkpoint
from tests.test_prepared import checksums, prepare


def main(count: int, folder: Path) -> int:
    """Print how many of `count` runs that were killed ended well; the status."""
    source = folder / "source"
    wait(start(write_source, source))
    started = time.perf_counter()
    wait(start(prepare_alone, source, folder / "whole"))
    seconds = time.perf_counter() - started
    wanted = checksums(folder / "whole")
    moments = random.Random(count)
    same = cut = 0
    for number in range(count):
        output = folder / f"out{number}"
        child = start(prepare_alone, source, output)
        time.sleep(moments.uniform(0, 1.2 * seconds))
        os.kill(child, signal.SIGKILL)
        wait(child)
        cut += not output.exists()
        if not output.exists():
            wait(start(prepare_alone, source, output))
        same += checksums(output) == wanted
        shutil.rmtree(output)
    print(f"{same} of {count} ended with the same bytes, {cut} of them after a kill in mid-work")
    # What a kill leaves after the output has its name is a journal, which the next prepare removes.
    return 0 if same == count and list(folder.glob(".*/whole")) == [] else 1


def write_source(path: Path) -> None:
    write_checkpoint(
        path, hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_hidden_layers=6,
        dtype=torch.bfloat16,
    )  # fmt: skip


def prepare_alone(source: Path, output: Path) -> None:
    prepare(source, output, 2)


def start(work: Callable[..., None], *arguments: Path) -> int:
    """A child at work. This process never computes with torch, so it may fork."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def wait(child: int) -> None:
    os.waitpid(child, 0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        sys.exit(main(int(sys.argv[1]), Path(name)))
