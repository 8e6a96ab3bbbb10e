"""The launcher's choice of a kernel: the fastest that works, recorded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.config import compose
from launcher.failures import ConfigError
from launcher.host import kernel_survey, kernels
from launcher.host.kernels import choose_kernel, fastest, slower_than_bfloat16
from launcher.job import first_difference
from quant.kernels import choice


def entry(decode_ms, prefill_ms, problem=None):
    ms = {"1": decode_ms, "8": 1.0, "128": prefill_ms}
    return {"problem": problem, "detail": "", "ms": {} if problem else {"w8a8": ms, "w8a16": ms}}


def survey(native=None, onednn="its int8 sums saturate on this processor"):
    return {
        "shape": [4096, 4096],
        "computes_on_gpus": False,
        "read_gb_s": 20.0,
        "waited": 0.01,
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


def test_a_survey_that_is_not_believed_is_said(monkeypatch):
    monkeypatch.setattr(kernels, "count_gpus", lambda: 0)
    monkeypatch.setattr(kernels, "survey", lambda: {**survey(), "waited": 0.4})
    *_, note = choose_kernel(config(), ("w8a16",))[1]
    assert note.startswith("the kernels were measured while others had the cores")


@pytest.mark.usefixtures("found")
def test_choice_is_recorded_and_slowness_is_said():
    chosen, notes = choose_kernel(config(), ("w8a16",))
    assert chosen.kernel == "native"
    assert notes == ("w8a16 is slower than bfloat16 weights here for 128 rows at once",)
    assert slower_than_bfloat16(survey(), "native", "w8a16") == [128]


def test_what_is_slower_by_no_more_than_times_move_is_not_called_slower():
    found = survey()
    found["kernels"]["native"]["ms"]["w8a16"] = {"1": 1.04, "8": 1.06}
    found["unquantized"]["bfloat16"] = {"1": 1.0, "8": 1.0}
    assert slower_than_bfloat16(found, "native", "w8a16") == [8]


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


def test_failed_survey_is_a_sentence(monkeypatch):
    monkeypatch.setattr(kernel_survey.sys, "executable", "/bin/false")
    monkeypatch.setattr(kernel_survey, "cache_path", lambda: None)
    with pytest.raises(ConfigError, match="write kernel=reference"):
        choose_kernel(config(device="cpu"), ["w8a8"])
    chosen, notes = choose_kernel(config(device="cpu", kernel="reference"), ["w8a8"])
    assert (chosen.kernel, notes) == ("reference", ())
