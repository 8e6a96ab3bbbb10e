"""The files beside the weights: config.json, the tokenizer, what generation starts from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from parallel.checkpoint.json_file import read_json_object
from parallel.checkpoint.regular_file import check_regular
from parallel.errors import CheckpointError

CONFIG = "config.json"
# What a tokenizer is made of; where another is given, none of the source's may stay beside it.
_TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
# What may lie beside a tokenizer that is one file of any name.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
COPIED_FILES = (CONFIG, "generation_config.json", *_TOKENIZER_FILES)
# Chat templates by name, beside the default one.
_TEMPLATES, _MOST_TEMPLATES = "additional_chat_templates", 100
_MOST_TEMPLATE_BYTES = 1 << 20


def side_files(source: Path, tokenizer: Path | None = None) -> dict[str, Path]:
    """What there is to copy, by the name that it gets.

    Args:
        tokenizer: a directory or a file, in place of the source's.
    """
    found = {name: source / name for name in COPIED_FILES} | _chat_templates(source)
    if tokenizer is not None:
        kept = (name for name in COPIED_FILES if name not in _TOKENIZER_FILES)
        found = {name: source / name for name in kept}
        if tokenizer.is_dir():
            found |= {name: tokenizer / name for name in _TOKENIZER_FILES}
            found |= _chat_templates(tokenizer)
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
        check_regular(path, *((_MOST_TEMPLATE_BYTES,) if name.startswith(_TEMPLATES) else ()))
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, directory / name)
    if CONFIG not in files or read_json_object(files[CONFIG]) != config:
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


def _chat_templates(source: Path) -> dict[str, Path]:
    """The chat templates that have a name of their own, by where they lie.

    Raises:
        CheckpointError: their directory leads elsewhere, or holds too many.
    """
    folder = source / _TEMPLATES
    if not folder.is_dir():
        return {}
    if folder.is_symlink():
        raise CheckpointError(
            f"{folder} must be a directory of the checkpoint's own, but is a link; copy it there."
        )
    found = sorted(islice(folder.glob("*.jinja"), _MOST_TEMPLATES + 1))
    if len(found) > _MOST_TEMPLATES:
        raise CheckpointError(
            f"{folder} must hold at most {_MOST_TEMPLATES} templates, but holds more; move some away."
        )
    return {f"{_TEMPLATES}/{template.name}": template for template in found}
