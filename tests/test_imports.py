"""A run imports nothing that it does not need: a second of an import is a second of every start."""

from __future__ import annotations

import os

import pytest

from tests.test_command import ROOT, run

# The first that every Python of a run imports, that of the forkserver and so of each rank.
WATCHER = """
import sys, traceback

class Watcher:
    def find_spec(self, name, path=None, target=None):
        if name in {names!r}:
            with open({log!r}, "a") as file:
                traceback.print_stack(file=file)

sys.meta_path.insert(0, Watcher())
"""
UNNEEDED = ("torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes", "sympy")
PROMPT = "prompt=The code of room"
BENCH = (
    "bench", "bench.tp=[1,2]", "bench.batch_sizes=[2]", "bench.prompt_lengths=[8]",
    "bench.new_tokens=3", "bench.repeats=1", "bench.plot=false",
)  # fmt: skip


@pytest.fixture
def importers(tmp_path):
    """Runs a command; returns the stacks of whoever in it asks for one of some modules."""

    def watched_run(names, *words):
        site, log = tmp_path / "site", tmp_path / "imports.log"
        site.mkdir()
        (tmp_path / "text.txt").write_text("The code of room 7 is 1234. " * 40)
        (site / "sitecustomize.py").write_text(WATCHER.format(names=names, log=str(log)))
        done = run(tmp_path, *words, PYTHONPATH=os.pathsep.join([str(site), str(ROOT)]))
        assert done.returncode == 0, done.stderr
        return log.read_text() if log.exists() else ""

    return watched_run


@pytest.mark.parametrize(
    "words",
    [
        (PROMPT, "parallel.tp=1"),
        (PROMPT, "parallel.tp=2", "quant=rtn_a16w8"),
        (PROMPT, "parallel.tp=2", "quant=rtn_a8w8"),
        ("eval", "quant=rtn_a16w8", "eval.text=text.txt"),
        (*BENCH, "quant=rtn_a8w8"),
    ],
    ids=["generate on one rank", "w8a16", "w8a8", "eval", "bench"],
)
def test_run_imports_nothing_of_torch_compile(importers, words):
    assert importers(UNNEEDED, *words) == ""


def test_import_by_a_rank_is_seen(importers):
    assert "in be_rank" in importers(("sentencepiece",), PROMPT)
