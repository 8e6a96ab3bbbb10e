"""The files beside the weights: config.json, the tokenizer, what generation starts from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel.checkpoint.open import read_config
from parallel.checkpoint.regular_file import check_regular

COPIED_FILES = (
    "config.json", "generation_config.json", "tokenizer.model", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip


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
    config = read_config(source)
    if (edited := edit(config)) != config or not (directory / "config.json").exists():
        text = json.dumps(edited, indent=2, ensure_ascii=False)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")
