"""What every test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.peers import users

# Ranks of a test share few cores: one thread each. Set before any process is started.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Real data beside the project; absent for its users, and nothing but tests looks for it.
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# Files that take longest, begun first: the others fill the gaps at the end.
LONG_FILES = (
    "test_rendezvous", "test_command", "test_calibration", "test_prepared", "test_calibrated_prepare",
    "test_parity", "test_eval", "test_plan", "test_shared_memory", "test_int4_ranks", "test_kv_ranks",
    "test_bench", "test_export", "test_captured",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    for item in items:
        if item.name.partition("[")[0] in users(item.path):
            item.add_marker("peers")


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.exists():
        pytest.skip("needs the shared test data, which is not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher's variables in the tester's shell must not change a test."""
    prefixes = ("MS_", "SLURM_", "OMPI_", "PMI_")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "RANK_ID", "RANK_SIZE", "DEVICE_ID")
    for name in list(os.environ):
        if name.startswith(prefixes) or name in names:
            monkeypatch.delenv(name)
