"""The files beside the weights: config.json, the tokenizer, what generation starts from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel.checkpoint.config_values import CONFIG, read_config_values
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

    Where another file says what the model is, a config.json is made from it.
    """
    for name in COPIED_FILES:
        if (source / name).exists():
            check_regular(source / name)
            shutil.copyfile(source / name, directory / name)
    config = read_config_values(source)
    if (edited := edit(config)) != config or not (source / CONFIG).exists():
        text = json.dumps(edited, indent=2, ensure_ascii=False)
        (directory / CONFIG).write_text(text + "\n", encoding="utf-8")
