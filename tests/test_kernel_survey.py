"""The survey of this machine's kernels: measured once, by one of those who ask, and kept."""

from __future__ import annotations

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from launcher.failures import ConfigError
from launcher.host import kernel_survey
from quant.kernels.survey import Contestant, least_times
from tests.test_kernel_choice import survey


def test_survey_is_measured_once(monkeypatch, tmp_path):
    measured = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_survey, "_measure", lambda: measured.append(1) or survey())
    assert kernel_survey.survey() == kernel_survey.survey() == survey()
    assert len(measured) == 1
    kernel_survey.cache_path().write_text("{ cut off")
    assert kernel_survey.survey() == survey()
    assert len(measured) == 2
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # other instructions, another answer
    kernel_survey.survey()
    assert len(measured) == 3


@pytest.mark.parametrize(
    "edit",
    [
        lambda found: found.pop("computes_on_gpus"),
        lambda found: found.update(unquantized=None),
        lambda found: found.update(kernels=["native", "onednn", "reference"]),
        lambda found: found["kernels"].update(native=None),
        lambda found: found["kernels"]["native"].pop("problem"),
        lambda found: found["kernels"]["native"]["ms"]["w8a8"].pop("128"),
        lambda found: found["kernels"]["native"]["ms"]["w8a8"].update({"1": "1 ms"}),
        lambda found: found["kernels"]["native"]["ms"]["w8a8"].update({"1": 0}),
    ],
)
def test_kept_survey_of_another_form_is_measured_again(monkeypatch, tmp_path, edit):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_survey, "_measure", survey)
    kernel_survey.survey()
    edited = survey()
    edit(edited)
    kernel_survey.cache_path().write_text(json.dumps(edited))
    assert kernel_survey.survey() == survey()
    kernel_survey.cache_path().write_text("[" * 100_000)
    assert kernel_survey.survey() == survey()


@pytest.mark.parametrize("busy", [{"waited": 0.4}, {"read_gb_s": 200.0}])
def test_a_survey_of_a_busy_machine_is_repeated_and_not_kept(monkeypatch, tmp_path, busy):
    """One read "w8a8 2 GB/s" for ever: what is implausible must not outlive its run."""
    found = [
        {**survey(), **busy},
        {**survey(), **busy, "waited": 0.3},
        {**survey(), **busy},
        survey(),
    ]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_survey, "_measure", lambda: found.pop(0))
    kernel_survey.survey()
    assert len(found) == 2
    assert not kernel_survey.cache_path().exists()
    assert kernel_survey.survey() == survey()
    assert not found
    assert kernel_survey.survey() == survey()


@pytest.mark.parametrize("busy", [{"waited": 0.4}, {"read_gb_s": 200.0}])
def test_a_survey_that_was_kept_of_a_busy_machine_is_not_believed(monkeypatch, tmp_path, busy):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_survey, "_measure", survey)
    kernel_survey.survey()
    kernel_survey.cache_path().write_text(json.dumps({**survey(), **busy}))
    assert kernel_survey.survey() == survey()


def test_runs_that_begin_at_once_measure_once(monkeypatch, tmp_path):
    measured = []

    def measure():
        measured.append(1)
        time.sleep(0.3)  # long enough for the others to come
        return survey()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_survey, "_measure", measure)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: kernel_survey.survey(), range(4)))
    assert found == [survey()] * 4
    assert len(measured) == 1


def test_nobody_waits_for_ever_for_one_that_stands_still(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_survey, "_TIMEOUT_S", 0.2)
    monkeypatch.setattr(kernel_survey, "_measure", survey)
    with kernel_survey._turn(kernel_survey.cache_path()):
        assert kernel_survey.survey() == survey()


def contestant(name, calls):
    return Contestant([lambda x_MK: calls.append((name, len(x_MK)))], torch.float32)


def test_busy_machine_is_measured_once_a_product():
    calls = []
    times = least_times({("native", "w8a16"): contestant("a", calls)}, 0.0)
    assert times.keys() == {("native", "w8a16")}
    assert set(times["native", "w8a16"]) == {"1", "8", "128"}
    assert [rows for _, rows in calls] == [1, 8, 128]


def test_what_is_compared_is_timed_in_turn():
    """So that whatever slows the machine for a while slows them all."""
    calls = []
    least_times({("native", name): contestant(name, calls) for name in "ab"}, 60.0)
    assert [name for name, _ in calls] == ["a", "b"] * (len(calls) // 2)
    assert [rows for _, rows in calls].count(1) == 2 * (1 + 12)


def test_home_that_cannot_be_written_costs_only_time(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(kernel_survey, "_measure", survey)
    assert kernel_survey.survey() == survey()


def test_user_without_a_home_is_served(monkeypatch):
    def refuse(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", refuse)
    monkeypatch.setattr(kernel_survey, "_measure", survey)
    assert kernel_survey.survey() == survey()


def answer(monkeypatch, output):
    done = subprocess.CompletedProcess([], 0, stdout=output, stderr="")
    monkeypatch.setattr(kernel_survey.subprocess, "run", lambda *_, **__: done)


def test_what_libraries_print_is_not_the_answer(monkeypatch):
    answer(monkeypatch, 'onednn_verbose,info\n{"kernels": 1}\n')
    assert kernel_survey._measure() == {"kernels": 1}
    answer(monkeypatch, "nothing of the kind")
    with pytest.raises(ConfigError, match="something else than its answer"):
        kernel_survey._measure()


def test_survey_takes_no_module_from_the_directory_it_is_called_in(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('this was executed')")
    monkeypatch.chdir(tmp_path)
    script = "import torch, quant.kernels.survey; print('{}')"
    real = subprocess.run

    def run(command, **how):
        return real([*command[:2], "-c", script], **how)

    monkeypatch.setattr(kernel_survey.subprocess, "run", run)
    assert kernel_survey._measure() == {}
