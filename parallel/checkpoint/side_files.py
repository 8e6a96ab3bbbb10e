"""The files beside the weights: config.json, the tokenizer, what generation starts from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from parallel.checkpoint.open import read_config
from parallel.checkpoint.regular_file import check_regular
from parallel.errors import CheckpointError

COPIED_FILES = (
    "config.json", "generation_config.json", "tokenizer.model", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# Chat templates by name, beside the default one.
_TEMPLATES, _MOST_TEMPLATES = "additional_chat_templates", 100
_MOST_TEMPLATE_BYTES = 1 << 20


def copy_files(
    source: Path, directory: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Copy what there is of them, byte for byte but for what `edit` changes in config.json.

    A source whose model stands in another file (Meta's params.json) gets a config.json.
    """
    for name in COPIED_FILES:
        if (source / name).exists():
            check_regular(source / name)
            shutil.copyfile(source / name, directory / name)
    for template in chat_templates(source):
        check_regular(template, _MOST_TEMPLATE_BYTES)
        (directory / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, directory / _TEMPLATES / template.name)
    config = read_config(source)
    if (edited := edit(config)) != config or not (directory / "config.json").exists():
        text = json.dumps(edited, indent=2, ensure_ascii=False)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def chat_templates(source: Path) -> list[Path]:
    """The chat templates that have a name of their own.

    Raises:
        CheckpointError: their directory leads elsewhere, or holds too many.
    """
    folder = source / _TEMPLATES
    if not folder.is_dir():
        return []
    if folder.is_symlink():
        raise CheckpointError(
            f"{folder} must be a directory of the checkpoint's own, but is a link; copy it there."
        )
    found = sorted(islice(folder.glob("*.jinja"), _MOST_TEMPLATES + 1))
    if len(found) > _MOST_TEMPLATES:
        raise CheckpointError(
            f"{folder} must hold at most {_MOST_TEMPLATES} templates, but holds more; move some away."
        )
    return found
