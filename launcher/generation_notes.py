"""What to say of a checkpoint's defaults of generation, which are its author's and not the run's."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from launcher.schema import GenerationSection
from parallel.checkpoint.open import Checkpoint

# What `generation` calls by another name than transformers.
_OWN_NAMES = {"stop_strings": "stop"}


def generation_notes(checkpoint: Checkpoint, section: GenerationSection) -> tuple[str, ...]:
    """One for what `generation.*` can say as well, unless it does, and one for what it cannot."""
    settable: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for key, value in checkpoint.unused_sampling.items():
        own = _OWN_NAMES.get(key, key)
        if not hasattr(section, own):
            unknown[key] = value
        elif getattr(section, own) != value:
            settable[key] = value
    says = f"the checkpoint's {checkpoint.sampling_file} says"
    notes = []
    if settable:
        names = ", ".join(f"generation.{_OWN_NAMES.get(key, key)}" for key in settable)
        notes.append(f"{says} {_listed(settable)}: not used, set {names}")
    if unknown:
        notes.append(
            f"{says} {_listed(unknown)}: not used, as there is no such key here, and transformers may "
            "write another text with it"
        )
    return tuple(notes)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={reprlib.repr(value)}" for key, value in values.items())
