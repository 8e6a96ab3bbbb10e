"""A few cells of schemes times methods, from calibration to logits; tests/check_matrix.py runs all."""

from __future__ import annotations

from pathlib import Path

import pytest

import quant.methods.awq
from tests.checkpoints import write_checkpoint

pytest.importorskip("transformers")

from tests.matrix import Cell, run_cell

CELLS = [
    Cell("w4 g32", "a16", "c8 static", "awq gptq"),
    Cell("w8", "a8 static", "c8", "smooth_quant"),
    Cell("w8 g32", "a8", "", "smooth gptq"),
    Cell("w4", "a8", "c8 static", "rtn"),
]
SAMPLES = [[(seed * 31 + 7 * place) % 2000 + 3 for place in range(16)] for seed in range(5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Biases of q, k and v, which folding divides too."""
    return write_checkpoint(
        tmp_path_factory.mktemp("model"),
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        use_sliding_window=False,
    )


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: " ".join(vars(cell).values()))
def test_a_cell_is_the_same_at_every_size_and_runs_as_it_should(cell, model, tmp_path, monkeypatch):
    monkeypatch.setattr(quant.methods.awq, "NUM_RATIOS", 2)
    run_cell(model, cell, SAMPLES, tmp_path)
