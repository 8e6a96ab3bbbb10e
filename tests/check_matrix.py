"""Every scheme times every method on the demo model and stories260K; a script, not a test of the suite.

    PYTHONPATH=. python tests/check_matrix.py [--models demo] [--methods rtn awq] [--full]

For each cell (tests/matrix.py): integers, scales and floats at 1, 2 and 4 ranks equal bit for bit;
logits equal to those of a float64 model that rounds where ours does; decode equal to prefill. Prints
the largest relative distances of the cells of each scheme and method, and what is refused and why.
The int8 KV cache, which the other three do not ask about, changes from cell to cell; --full runs each
cell with each.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

import quant.methods.awq
from launcher.resolve import DEMO
from launcher.table import print_table
from parallel.checkpoint.open import open_checkpoint
from quant.errors import QuantError
from tests.conftest import SHARED
from tests.matrix import ACTIVATIONS, CACHES, METHODS, WEIGHTS, Cell, run_cell

MODELS = {"demo": DEMO, "stories260K": SHARED / "checkpoints/stories260K/hf"}


def cells(methods: list[str], *, is_full: bool) -> Iterator[Cell]:
    for number, (method, weights, activations) in enumerate(
        itertools.product(methods, WEIGHTS, ACTIVATIONS)
    ):
        caches = tuple(CACHES) if is_full else (tuple(CACHES)[(number + number // 3) % 3],)
        yield from (Cell(weights, activations, cache, method) for cache in caches)


def make_samples(path: Path) -> list[list[int]]:
    size = open_checkpoint(path).config.vocab_size
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, size, (n,), generator=generator).tolist() for n in (24, 9, 17, 24, 12)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--full", action="store_true", help="every KV cache in every cell")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    quant.methods.awq.NUM_RATIOS = 5  # which ratios there are is for other tests
    rows = [("model", "weights", "activations", "cache", "method", "float64", "decode", "s")]
    refused: dict[str, list[str]] = {}
    for name in given.models:
        samples = make_samples(MODELS[name])
        for cell in cells(given.methods, is_full=given.full):
            words = (name, cell.weights, cell.activations, cell.cache or "-", cell.method)
            try:
                cell.scheme()
            except QuantError as error:
                refused.setdefault(str(error), []).append(" ".join(words[1:]))
                continue
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                found = run_cell(MODELS[name], cell, samples, Path(folder))
            seconds = time.perf_counter() - started
            rows.append((*words, f"{found.reference:.1e}", f"{found.decode:.1e}", f"{seconds:.1f}"))
            print(*rows[-1], file=sys.stderr, flush=True)
    print_table(rows)
    for reason, names in refused.items():
        print(f"\nrefused {len(names)} times ({names[0]}): {reason}")


if __name__ == "__main__":
    main()
