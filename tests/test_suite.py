"""What the suite promises about itself: its versions, its warnings, and which tests need peers."""

from __future__ import annotations

import re
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.peers import users

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = "tests/constraints.txt"


def pins() -> dict[str, str]:
    lines = (ROOT / CONSTRAINTS).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_constraints_pin_what_the_project_asks_for_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, asked):
        assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_constraints_leave_the_build_of_torch_to_the_platform():
    assert "+" not in pins()["torch"]
    assert not [name for name in pins() if re.match("nvidia|cuda|triton", name)]


def test_readme_and_continuous_integration_install_with_the_constraints():
    command = f"pip install -c {CONSTRAINTS} -e '.[dev]' && scripts/test"
    assert f"\n{command}\n" in (ROOT / "README.md").read_text()
    install, _, passes = command.partition(" && ")
    assert re.search(
        rf"^{re.escape(install).replace('install', 'install --quiet')}\n{passes}$",
        (ROOT / ".ci/run").read_text(),
        re.MULTILINE,
    )


def test_readme_names_the_torch_of_the_constraints():
    """Another would be replaced by the build that pip takes by itself: gigabytes of CUDA on Linux."""
    (version,) = re.findall(
        r"pip install torch==(\S+) --index-url", (ROOT / "README.md").read_text()
    )
    assert version == pins()["torch"]


@pytest.mark.parametrize("module", ["quant.linear", "parallel.load", "launcher.text", __name__])
def test_a_warning_of_our_own_code_is_an_error(module):
    with pytest.raises(FutureWarning, match="soon gone"):
        warn_in(module)


@pytest.mark.parametrize("module", ["transformers.utils", "torch.nn.modules.module", "quantlib.x"])
def test_a_warning_of_a_peers_code_fails_nothing(module):
    with warnings.catch_warnings(record=True) as seen:
        warn_in(module)
    assert [str(warning.message) for warning in seen] == ["soon gone"]


def warn_in(module: str) -> None:
    warnings.warn_explicit("soon gone", FutureWarning, "some file", 1, module=module)


HELPER = """
import transformers
LIMIT = 3
def judge(path): return transformers.AutoModel.from_pretrained(path)
"""
TESTS = """
import pytest
from tests.helper import LIMIT, judge
@pytest.fixture
def library(): return pytest.importorskip("compressed_tensors.compressors")
@pytest.fixture
def packed(library): return library.pack()
def read(path):
    from tokenizers import Tokenizer
    return Tokenizer.from_file(path)
def test_by_a_helper_elsewhere(): judge("x")
def test_by_a_fixture_of_a_fixture(packed): assert packed
def test_by_a_helper_here(): read("transformers")
def test_that_names_one(): assert LIMIT < len("transformers")
"""


def test_tests_that_use_a_peer_are_found_in_their_source(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.peers.ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "helper.py").write_text(HELPER)
    path = tmp_path / "tests" / "test_x.py"
    path.write_text(TESTS)
    assert {name for name in users(path) if name.startswith("test_")} == {
        "test_by_a_helper_elsewhere", "test_by_a_fixture_of_a_fixture", "test_by_a_helper_here",
    }  # fmt: skip
