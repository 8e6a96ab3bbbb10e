"""Progress bars on a terminal; nothing where there is none."""

from __future__ import annotations

import threading
from typing import Any, TextIO

from tqdm import tqdm


def open_bar(console: TextIO, *, is_shown: bool = True, **options: Any) -> tqdm[Any]:
    """A bar of tqdm's with its own options; silent where `console` is no terminal."""
    # tqdm's own lock is a semaphore of the system, which a killed rank would leave behind.
    tqdm.set_lock(threading.RLock())
    return tqdm(file=console, disable=not (is_shown and console.isatty()), **options)
