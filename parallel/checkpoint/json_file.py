"""JSON files of a checkpoint directory, read with errors that are sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises CheckpointError where the file is missing, is not JSON, or is not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; give a Hugging Face directory.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); copy it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object; copy it again.")
    return value
