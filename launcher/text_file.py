"""Text files that the user names by a key: read whole, in UTF-8, of bounded size."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from launcher.failures import ConfigError
from parallel.checkpoint.regular_file import reason

_MOST_BYTES = 256 << 20


def read_text(key: str, name: str) -> str:
    """The file's text with `\\n` as its line ends; `-` is stdin.

    A pipe is read too, so its size is bounded while it is read.

    Raises:
        ConfigError: it cannot be read, is too large or is not UTF-8.
    """
    try:
        with _open(name) as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`{key}` {name} cannot be read ({reason(error)}); give a text file in UTF-8."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_lines(text: str) -> Iterator[tuple[int, str, Any]]:
    """(number from 1, line, what it holds) of each line that is not blank; None of no JSON."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, line, json.loads(line)
        except (ValueError, RecursionError):
            yield number, line, None


def beginning(text: str) -> str:
    """A text of any length as part of a sentence."""
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}…"


def has_lone_surrogate(text: str) -> bool:
    """JSON can name half a character (`\\ud800`), which no tokenizer and no file takes."""
    return any("\ud800" <= sign <= "\udfff" for sign in text)


def _open(name: str) -> AbstractContextManager[BinaryIO]:
    if name != "-":
        return Path(name).open("rb")
    if sys.stdin is None:  # the shell's `<&-`
        raise ValueError("stdin is closed")
    return nullcontext(sys.stdin.buffer)
