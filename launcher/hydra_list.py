"""Texts of any kind as one word of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable


def hydra_list(texts: Iterable[str]) -> str:
    """A list as Hydra reads it, each text as it is: `["lm_head","w2"]`."""
    return f"[{','.join(map(_quoted, texts))}]"


def _quoted(text: str) -> str:
    """By Hydra's rules: a quote gets a backslash, and backslashes before a quote are doubled."""
    text = re.sub(r'(\\*)"', r'\1\1\\"', text)
    return '"' + re.sub(r"(\\+)\Z", r"\1\1", text) + '"'
