"""Peak anonymous memory of each process of a `prepare` that calibrates a random model of 13B layers.

    PYTHONPATH=. python tests/check_calibration_memory.py FOLDER [--methods rtn] [--tp 1 2] [--samples 9]

A script, not a test of the suite: the model is 2.6 GB in FOLDER (made once), and GPTQ takes minutes.
What a process holds of itself (the interpreter, torch) is that of the same run of a tiny model, and is
taken off. The limit is 1.5 layers of the checkpoint, and for GPTQ two float32 matrices of in_features
squared more; the activations of the few short samples are not in it, and are printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from launcher.table import print_table
from parallel.calibration.samples import deal
from parallel.calibration.walk import BLOCK_SAMPLES
from parallel.group import SimulatedGroup
from tests.checkpoints import CONFIG, write_checkpoint

SHAPE = {
    "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40,
    "num_key_value_heads": 40,
}  # fmt: skip
# Two ranks can cut it between groups of 128 columns.
TINY = {"hidden_size": 256, "intermediate_size": 512}
STATIC = (
    "quant.activation_dtype=int8", "quant.act_quant_granularity=per_tensor",
    "quant.kvcache_dtype=int8", "quant.kvcache_quant_granularity=per_channel",
)  # fmt: skip
METHODS = {
    "rtn": ("quant=ptq",),
    "smooth_quant": ("quant=smooth_quant",),
    "smooth_quant static": ("quant=smooth_quant", "quant.act_quant_granularity=per_tensor"),
    "rtn static": ("quant=ptq", *STATIC),
    "awq": ("quant=awq",),
    "awq static": ("quant=ptq", "quant.outliers_suppression=awq", *STATIC),
    "gptq": ("quant=gptq",),
    "smooth gptq static": (
        "quant=ptq", "quant.outliers_suppression=smooth", "quant.precision_recovery=gptq", *STATIC,
    ),
}  # fmt: skip
LAYER_BYTES = 2 * (4 * 5120**2 + 3 * 5120 * 13824)
HESSIAN_BYTES = 4 * 13824**2
# Of a token: residual streams before and after, in float32, and the inputs of every product.
TOKEN_BYTES = 4 * (3 * 5120 + 13824)


def models(folder: Path, num_layers: int) -> dict[str, Path]:
    """A tiny model and one of 13B layers, in bfloat16; both have the demo's vocabulary."""
    found = {"tiny": folder / "tiny", "13B": folder / f"layers_{num_layers}"}
    for name, path in found.items():
        if not path.exists():
            shape = {**SHAPE, "num_hidden_layers": num_layers} if name == "13B" else TINY
            made = write_checkpoint(
                path.with_suffix(".part"), dtype=torch.bfloat16, **{**CONFIG, **shape}
            )
            made.rename(path)
    return found


def peak_of_processes(command: list[str]) -> tuple[dict[int, int], float]:
    """The most anonymous bytes seen of each process of a command, and its seconds."""
    peaks: dict[int, int] = {}
    started = time.perf_counter()
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while running.poll() is None:
        for process in family(running.pid):
            peaks[process] = max(peaks.get(process, 0), anonymous_bytes(process))
        time.sleep(0.02)
    assert running.stderr is not None
    assert running.returncode == 0, running.stderr.read().decode()
    return peaks, time.perf_counter() - started


def family(process: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield process
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        children = " ".join((task / "children").read_text() for task in tasks).split()
    except OSError:  # it has ended
        return
    for child in children:
        yield from family(int(child))


def anonymous_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:")]
    return found[0] if found else 0


@dataclass(frozen=True)
class Texts:
    """Of a calibration."""

    path: Path
    count: int
    length: int

    def activation_bytes(self, tp: int) -> int:
        """Of the rank that has most: whole blocks of samples are dealt to the ranks."""
        num_samples = max(sum(map(len, rounds)) for rounds in self._dealt(tp))
        return TOKEN_BYTES * num_samples * self.length

    def _dealt(self, tp: int) -> list[list[range]]:
        return [deal(self.count, BLOCK_SAMPLES, SimulatedGroup(rank, tp)) for rank in range(tp)]


def peaks_of_ranks(model: Path, method: str, tp: int, texts: Texts) -> tuple[list[int], float]:
    """Of the `tp` processes that held most."""
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        words = [
            f"checkpoint={model}", f"output={folder}/out", f"run_root={folder}/runs",
            f"parallel.tp={tp}", f"calibration.data={texts.path}",
            f"calibration.num_samples={texts.count}", f"calibration.max_length={texts.length}",
            "calibration.num_held_out=0", *METHODS[method],
        ]  # fmt: skip
        command = [sys.executable, "-m", "launcher", "prepare", *words]
        peaks, seconds = peak_of_processes(command)
    return sorted(peaks.values(), reverse=True)[:tp], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    given = parser.parse_args()
    os.environ |= {"MALLOC_ARENA_MAX": "2"}
    given.folder.mkdir(exist_ok=True)
    found = models(given.folder, given.layers)
    texts = Texts(given.folder / "texts.txt", given.samples, given.length)
    shutil.copyfile(Path(__file__).parents[1] / "launcher/demo/calibration.txt", texts.path)
    rows = [("method", "tp", "of a rank, MB", "of itself, MB", "layers", "limit", "seconds")]
    for method in given.methods:
        for tp in given.tp:
            own, _ = peaks_of_ranks(found["tiny"], method, tp, texts)
            peaks, seconds = peaks_of_ranks(found["13B"], method, tp, texts)
            beyond = max(peaks) - max(own) - texts.activation_bytes(tp)
            limit = 1.5 + (2 * HESSIAN_BYTES / LAYER_BYTES if "gptq" in method else 0)
            rows.append(
                (method, str(tp), f"{max(peaks) / 1e6:.0f}", f"{max(own) / 1e6:.0f}",
                 f"{beyond / LAYER_BYTES:.2f}", f"{limit:.2f}", f"{seconds:.0f}")
            )  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    print_table(rows)


if __name__ == "__main__":
    main()
