"""The rooms of the house: imports go one way, and some libraries have one door."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {
    "quant": {"quant", "torch"},
    "parallel": {"parallel", "quant", "torch", "safetensors", "yaml"},
    "launcher": {
        "launcher", "parallel", "quant", "torch", "hydra", "omegaconf", "yaml", "tqdm",
        "sentencepiece", "tokenizers", "matplotlib",
    },
    "conf": set(),
}  # fmt: skip
# Who alone may import, or use, what.
DOORS = {
    "torch.distributed": ("parallel/collectives/network.py", "launcher/ranks/"),
    "safetensors": ("parallel/checkpoint/",),
    # The launcher's own files, and those of MindFormers that lie beside weights.
    "yaml": ("launcher/", "parallel/checkpoint/mindformers/yaml_file.py"),
    "hydra": ("launcher/config.py",),
    "omegaconf": ("launcher/config.py",),
    "signal": ("launcher/",),
    "subprocess": ("launcher/",),
    "multiprocessing": ("launcher/ranks/",),
    "matplotlib": ("launcher/picture.py",),
}  # fmt: skip
SOURCES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    allowed = LAYERS[path.relative_to(ROOT).parts[0]]
    for name in imports(path):
        top = name.partition(".")[0]
        assert top in allowed or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_rooms_of_the_launcher_import_from_no_later_one():
    rooms = ("environment", "host", "ranks", "tasks")
    for at, room in enumerate(rooms):
        closed = tuple(f"launcher.{later}." for later in rooms[at + 1 :])
        for path in (ROOT / "launcher" / room).rglob("*.py"):
            # Which imports a task's module by name, when it runs.
            names = set(imports(path)) - {"launcher.tasks.rank_task"}
            later = {name for name in names if name.startswith(closed)}
            assert not later, f"{path} imports {later}"


@pytest.mark.parametrize("door", DOORS)
def test_library_is_imported_behind_its_door_only(door):
    for path in SOURCES:
        place = str(path.relative_to(ROOT))
        used = any(name == door or name.startswith(door + ".") for name in imports(path))
        assert not used or place.startswith(DOORS[door]), f"{place} imports {door}"


def test_environment_is_read_by_the_launcher_only():
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] == "launcher":
            continue
        names = [
            n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)
        ]
        assert not {"environ", "getenv"} & set(names), path


def test_errors_are_caught_by_name():
    """`except Exception` and `except:` hide bugs; the worker's recorder catches BaseException."""
    allowed = {
        "launcher/ranks/worker.py",
        "launcher/text/json_tokenizer.py",
        "launcher/text/open.py",
        "parallel/group.py",
        "parallel/checkpoint/whole_directory.py",
    }
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                name = ast.unparse(node.type) if node.type else "everything"
                broad = name in ("Exception", "BaseException", "everything")
                assert not broad or str(path.relative_to(ROOT)) in allowed, f"{path}:{node.lineno}"


def test_every_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent.relative_to(ROOT) for path in SOURCES if path.name == "__init__.py"}
    assert {".".join(folder.parts) for folder in folders} == set(
        settings["tool"]["setuptools"]["packages"]
    )


def test_plan_and_checks_of_the_configuration_need_no_torch():
    script = (
        "import sys; import launcher.__main__, launcher.resolve, launcher.tasks.plan.run, "
        "launcher.ranks.workers; "
        "from launcher.config import compose; compose(['prompt=x']); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
