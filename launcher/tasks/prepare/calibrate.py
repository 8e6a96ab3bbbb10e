"""Calibration of a `prepare`, on all its ranks: each layer's integers, and what they cost in quality."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from launcher.failures import RunError
from launcher.output import calibration_path
from launcher.progress import open_bar
from launcher.ranks.rank import Rank
from parallel.calibration.allocator import return_freed_blocks
from parallel.calibration.held_out import HeldOut, Perplexities
from parallel.calibration.recipes import recipe_of
from parallel.calibration.result import MODULES, LayerError
from parallel.calibration.walk import Calibration, calibrate
from parallel.checkpoint.layout import Layout
from parallel.checkpoint.open import Checkpoint
from parallel.checkpoint.readers.calibrated import CalibratedSource


@dataclass(frozen=True)
class Calibrated:
    """What calibration gives.

    Attributes:
        source: the checkpoint as it has become.
        errors: of each layer.
        perplexities: where there are held-out texts.
        state_dir: holds what `source` reads; to be removed after it.
        seconds: that it took.
    """

    source: CalibratedSource
    errors: list[LayerError]
    perplexities: Perplexities | None
    state_dir: Path
    seconds: float


def calibrate_rank(rank: Rank, checkpoint: Checkpoint, layout: Layout, output: Path) -> Calibrated:
    """One rank's part; the files it leaves are on the disk of `output`, which all ranks share.

    Raises:
        RunError: on rank 0: the perplexity has grown by more than is allowed.
    """
    return_freed_blocks()
    state_dir = calibration_path(output)
    started = time.perf_counter()
    calibration = _calibration(rank, checkpoint, layout)
    errors, found = _walk(rank, calibration, layout, state_dir)
    seconds = time.perf_counter() - started
    if rank.group.rank == 0:
        _check_gate(rank.job.config.quant.max_perplexity_increase, found, state_dir)
    rank.group.barrier()
    source = _calibrated(checkpoint, layout, calibration, state_dir)
    return Calibrated(source, errors, found, state_dir, seconds)


def _calibration(rank: Rank, checkpoint: Checkpoint, layout: Layout) -> Calibration:
    texts = rank.job.texts
    return Calibration(
        checkpoint.config,
        checkpoint.source,
        texts.samples,
        partial(recipe_of, layout),
        torch.float32,
        held_out_ids=texts.held_out,
    )


def _walk(
    rank: Rank, calibration: Calibration, layout: Layout, state_dir: Path
) -> tuple[list[LayerError], Perplexities | None]:
    """Each layer's error, and the perplexities where there are texts for them."""
    held_out = HeldOut(calibration.held_out_ids) if calibration.held_out_ids else None
    errors = []
    with _bar(rank, calibration.config.num_hidden_layers, "calibrating", unit="layer") as bar:
        for layer in calibrate(calibration, rank.group, state_dir=state_dir, held_out=held_out):
            errors.append(layer.error)
            del layer  # or its integers would stand beside the next one's
            bar.update()
    if held_out is None:
        return errors, None
    count = len(held_out.floats) + len(held_out.rounded)
    with _bar(rank, count, "perplexity", unit="text") as bar:
        return errors, held_out.perplexities(
            layout, calibration.source, rank.group, on_text=bar.update
        )


def _calibrated(
    checkpoint: Checkpoint, layout: Layout, calibration: Calibration, state_dir: Path
) -> CalibratedSource:
    files = sorted(state_dir.glob("layer_*.safetensors"))
    assert len(files) == layout.config.num_hidden_layers, files
    bits = {name: scheme.bits for name, scheme in layout.schemes.items()}
    return CalibratedSource(checkpoint.source, files, MODULES, bits, calibration.identity())


def _check_gate(most: float | None, found: Perplexities | None, state_dir: Path) -> None:
    if most is None or found is None or found.increase <= most:
        return
    raise RunError(
        f"the perplexity of the held-out texts grew by {found.increase:.2f} % "
        f"({found.before.perplexity:.4f} to {found.after.perplexity:.4f}), more than "
        f"`quant.max_perplexity_increase`, {most:g} %; nothing was written. The calibration is kept in "
        f"{state_dir}: a run with a higher limit goes on from there, or remove it"
    )


def _bar(rank: Rank, total: int, name: str, **options: Any) -> tqdm[Any]:
    is_shown = rank.group.rank == 0
    return open_bar(rank.console, is_shown=is_shown, total=total, desc=name, leave=False, **options)
