"""YAML as data, bounded: what its aliases stand for is counted before any of it is made.

`yaml.safe_load` shares what an alias names, so a file of a few lines can stand for more than a
memory holds, as soon as somebody walks or prints it; merge keys even copy it. MindFormers' files do
use aliases, so they are counted, not refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from parallel.checkpoint.regular_file import check_regular, reason
from parallel.errors import CheckpointError

# Theirs have some 10 KB.
MOST_BYTES = 256 << 10
MOST_VALUES = 100_000
# Python writes none above 4,300 decimal digits, and no sentence should.
_MOST_DIGITS = 1000


def parse_yaml(text: str) -> Any:
    """The value of one document.

    Raises:
        yaml.YAMLError: it is no YAML, nests too deeply, refers to itself, stands for more than
            MOST_VALUES values, or has an integer that is too long to be written.
        ValueError: a date or number that is none.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if (count := _count(node, {})) > MOST_VALUES:
            raise yaml.YAMLError(
                f"its aliases stand for more than {MOST_VALUES:,} values: {count:,}"
            )
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("it nests too deeply") from error
    finally:
        loader.dispose()


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Raises CheckpointError where the file is missing, too long, or no mapping of keys."""
    check_regular(path, MOST_BYTES)
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path} is not readable YAML ({where(error)}); correct it."
        ) from error
    if other := other_than_mapping(values):
        raise CheckpointError(
            f"{path} must be a mapping of keys, but holds {other}; use a predict YAML of "
            "MindFormers, or a config.json."
        )
    mapping: dict[str, Any] = values
    return mapping


def other_than_mapping(values: Any) -> str | None:
    """What a document holds that is no mapping of words; None: it is one."""
    if not isinstance(values, dict):
        return "nothing" if values is None else f"a {type(values).__name__}"
    strange = [key for key in values if not isinstance(key, str)]
    return f"the key {strange[0]!r}, which is not a string" if strange else None


def where(error: Exception) -> str:
    """A parser's several lines as one."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return reason(error)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node stands for, those of its aliases as often as they are named."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith(":int") and len(node.value) > _MOST_DIGITS:
            raise yaml.YAMLError(f"it has an integer of {len(node.value):,} digits")
        return 1
    if id(node) in known:
        if known[id(node)] == 0:
            raise yaml.YAMLError("it has an alias for what the alias stands in")
        return known[id(node)]
    known[id(node)] = 0
    children = [
        part for item in node.value for part in (item if isinstance(item, tuple) else [item])
    ]
    known[id(node)] = 1 + sum(_count(child, known) for child in children)
    return known[id(node)]
