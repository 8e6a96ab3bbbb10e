"""The launcher's choice of a kernel: measured once, kept, and recorded."""

from __future__ import annotations

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launcher.config import compose
from launcher.failures import ConfigError
from launcher.host import kernels
from launcher.host.kernels import choose_kernel, fastest, slower_than_bfloat16
from launcher.job import first_difference
from quant.kernels import choice
from quant.kernels.survey import Stopwatch


def entry(decode_ms, prefill_ms, problem=None):
    ms = {"1": decode_ms, "8": 1.0, "128": prefill_ms}
    return {"problem": problem, "detail": "", "ms": {} if problem else {"w8a8": ms, "w8a16": ms}}


def survey(native=None, onednn="its int8 sums saturate on this processor"):
    return {
        "shape": [4096, 4096],
        "computes_on_gpus": False,
        "kernels": {
            "native": entry(1.0, 50.0, native),
            "onednn": entry(0.5, 20.0, onednn),
            "reference": {"problem": None, "detail": "", "ms": {}},
        },
        "unquantized": {"bfloat16": {"1": 2.0, "8": 2.0, "128": 40.0}},
    }


@pytest.fixture
def found(monkeypatch, request):
    monkeypatch.setattr(kernels, "count_gpus", lambda: 0)
    monkeypatch.setattr(kernels, "survey", lambda: survey(**getattr(request, "param", {})))


def config(**values):
    return replace(compose(["prompt=x"]), **values)


def test_names_are_those_of_the_kernels():
    assert ("auto", *choice.KERNELS) == kernels.NAMES


def test_fastest_of_those_that_work_is_taken():
    assert fastest(survey(), "w8a8") == "native"
    assert fastest(survey(onednn=None), "w8a8") == "onednn"
    assert fastest(survey(native="not compiled"), "w8a8") == "reference"


@pytest.mark.usefixtures("found")
def test_choice_is_recorded_and_slowness_is_said():
    chosen, notes = choose_kernel(config(), ("w8a16",))
    assert chosen.kernel == "native"
    assert notes == ("w8a16 is slower than bfloat16 weights here for 128 rows at once",)
    assert slower_than_bfloat16(survey(), "native", "w8a16") == [128]


@pytest.mark.parametrize("found", [{"native": "not compiled: no C compiler"}], indirect=True)
@pytest.mark.usefixtures("found")
def test_fallback_is_said_with_its_reason():
    chosen, notes = choose_kernel(config(), ("w8a8",))
    assert chosen.kernel == "reference"
    assert "no C compiler" in notes[0]


@pytest.mark.usefixtures("found")
def test_schemes_without_a_product_of_their_own_are_said_to_take_the_reference():
    chosen, notes = choose_kernel(config(), ["w4a16 g128"])
    assert chosen.kernel == "reference"
    assert notes == (
        "w4a16 g128 products take the slow reference path (native: it has none for them)",
    )
    chosen, notes = choose_kernel(config(), ["w4a16 g128", "w8a8"])
    assert chosen.kernel == "native"
    assert "w4a16 g128 products take the slow reference path" in notes[-1]
    assert choose_kernel(config(kernel="reference"), ["w4a16", "w8a8"])[1] == ()


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize(
    ("values", "labels", "words"),
    [
        ({"kernel": "onednn"}, ["w8a8"], "saturate"),
        ({"kernel": "native"}, [], "no effect"),
        ({"kernel": "native"}, ["w4a16 g128"], "no product for w4a16 g128"),
        ({"kernel": "native", "device": "cuda"}, ["w8a8"], "CPUs only"),
    ],
)
def test_kernel_that_cannot_be_is_refused(values, labels, words):
    with pytest.raises(ConfigError, match=words):
        choose_kernel(config(**values), labels)


def test_misspelled_kernel_is_refused():
    with pytest.raises(ConfigError, match="must be one of auto, native"):
        kernels.check_kernel(config(kernel="fast"))


@pytest.mark.usefixtures("found")
def test_gpus_take_the_path_of_torch():
    assert choose_kernel(config(device="cuda"), ("w8a16",))[0].kernel == "reference"


def test_gpu_that_torch_cannot_use_changes_nothing(monkeypatch):
    """A GPU in the host, and the wheel of torch that computes on CPUs only."""
    monkeypatch.setattr(kernels, "count_gpus", lambda: 1)
    monkeypatch.setattr(kernels, "survey", survey)
    assert choose_kernel(config(), ("w8a16",))[0].kernel == "native"
    monkeypatch.setattr(kernels, "survey", lambda: {**survey(), "computes_on_gpus": True})
    assert choose_kernel(config(), ("w8a16",))[0].kernel == "reference"


def test_other_ranks_leave_the_choice_to_rank_0():
    assert first_difference(config(), config(kernel="native")) is None
    assert first_difference(config(kernel="onednn"), config(kernel="native")) is not None


def test_survey_is_measured_once(monkeypatch, tmp_path):
    measured = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "_measure", lambda: measured.append(1) or survey())
    assert kernels.survey() == kernels.survey() == survey()
    assert len(measured) == 1
    kernels.cache_path().write_text("{ cut off")
    assert kernels.survey() == survey()
    assert len(measured) == 2
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # other instructions, another answer
    kernels.survey()
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
    monkeypatch.setattr(kernels, "_measure", survey)
    kernels.survey()
    edited = survey()
    edit(edited)
    kernels.cache_path().write_text(json.dumps(edited))
    assert kernels.survey() == survey()
    kernels.cache_path().write_text("[" * 100_000)
    assert kernels.survey() == survey()


def test_runs_that_begin_at_once_measure_once(monkeypatch, tmp_path):
    measured = []

    def measure():
        measured.append(1)
        time.sleep(0.3)  # long enough for the others to come
        return survey()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "_measure", measure)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: kernels.survey(), range(4)))
    assert found == [survey()] * 4
    assert len(measured) == 1


def test_nobody_waits_for_ever_for_one_that_stands_still(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "_SURVEY_TIMEOUT_S", 0.2)
    monkeypatch.setattr(kernels, "_measure", survey)
    with kernels._turn(kernels.cache_path()):
        assert kernels.survey() == survey()


def test_busy_machine_is_measured_once_a_product(monkeypatch):
    calls = []
    times = Stopwatch(0.0).times([lambda x_MK: calls.append(len(x_MK))], torch.float32)
    assert set(times) == {"1", "8", "128"}
    assert calls == [1, 1, 8, 8, 128, 128]  # one before, to warm up


def test_home_that_cannot_be_written_costs_only_time(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(kernels, "_measure", survey)
    assert kernels.survey() == survey()


def test_user_without_a_home_is_served(monkeypatch):
    def refuse(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", refuse)
    monkeypatch.setattr(kernels, "_measure", survey)
    assert kernels.survey() == survey()


def answer(monkeypatch, output):
    done = subprocess.CompletedProcess([], 0, stdout=output, stderr="")
    monkeypatch.setattr(kernels.subprocess, "run", lambda *_, **__: done)


def test_what_libraries_print_is_not_the_answer(monkeypatch):
    answer(monkeypatch, 'onednn_verbose,info\n{"kernels": 1}\n')
    assert kernels._measure() == {"kernels": 1}
    answer(monkeypatch, "nothing of the kind")
    with pytest.raises(ConfigError, match="something else than its answer"):
        kernels._measure()


def test_survey_takes_no_module_from_the_directory_it_is_called_in(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('this was executed')")
    monkeypatch.chdir(tmp_path)
    script = "import torch, quant.kernels.survey; print('{}')"
    real = subprocess.run

    def run(command, **how):
        return real([*command[:2], "-c", script], **how)

    monkeypatch.setattr(kernels.subprocess, "run", run)
    assert kernels._measure() == {}


def test_failed_survey_is_a_sentence(monkeypatch):
    monkeypatch.setattr(kernels.sys, "executable", "/bin/false")
    monkeypatch.setattr(kernels, "cache_path", lambda: None)
    with pytest.raises(ConfigError, match="write kernel=reference"):
        choose_kernel(config(device="cpu"), ["w8a8"])
    chosen, notes = choose_kernel(config(device="cpu", kernel="reference"), ["w8a8"])
    assert (chosen.kernel, notes) == ("reference", ())
