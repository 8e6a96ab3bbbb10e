"""Where the C of a package lies once it was compiled, which setup.py does where it can."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def find_compiled(directory: Path, stem: str) -> Path | None:
    """The library `stem` of a package's directory; None: there was no C compiler at installation."""
    paths = (directory / f"{stem}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)
