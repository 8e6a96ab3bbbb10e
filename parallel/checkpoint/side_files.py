"""The files beside the weights: config.json, the tokenizer, what generation starts from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallel.checkpoint.json_file import read_json_object
from parallel.checkpoint.regular_file import check_regular

CONFIG = "config.json"
# What a tokenizer is made of; where another is given, none of the source's may stay beside it.
_TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
# What may lie beside a tokenizer that is one file of any name.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
COPIED_FILES = (CONFIG, "generation_config.json", *_TOKENIZER_FILES)


def side_files(source: Path, tokenizer: Path | None = None) -> dict[str, Path]:
    """What there is to copy, by the name that it gets.

    Args:
        tokenizer: a directory or a file, in place of the source's.
    """
    found = {name: source / name for name in COPIED_FILES}
    if tokenizer is not None:
        found = {name: path for name, path in found.items() if name not in _TOKENIZER_FILES}
        if tokenizer.is_dir():
            found |= {name: tokenizer / name for name in _TOKENIZER_FILES}
        else:
            found |= {name: tokenizer.with_name(name) for name in _COMPANIONS}
            found[f"tokenizer{'.json' if tokenizer.suffix == '.json' else '.model'}"] = tokenizer
    return {name: path for name, path in found.items() if path.exists()}


def copy_files(
    source: Path, directory: Path, config: Mapping[str, Any], tokenizer: Path | None = None
) -> None:
    """Copy what there is of them, byte for byte but for a config.json that says something else.

    Args:
        config: what config.json must say, also where the source has none.
        tokenizer: as in `side_files`.
    """
    files = side_files(source, tokenizer)
    for name, path in files.items():
        check_regular(path)
        shutil.copyfile(path, directory / name)
    if CONFIG not in files or read_json_object(files[CONFIG]) != config:
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (directory / CONFIG).write_text(text + "\n", encoding="utf-8")
