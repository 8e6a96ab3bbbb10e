"""What to type after quant_ckpt.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from parallel.checkpoint.mindformers.directory import find_model_file, is_model_file
from parallel.checkpoint.readers.prepared import prepared_size


def next_line(predict: Sequence[str], source: str, output: Path) -> list[str]:
    """The words that generate with what was written.

    Args:
        predict: how the user starts what takes MindFormers' arguments; it needs their YAML.
        source: what -c says: that YAML, or a checkpoint's directory, which may hold one.
    """
    yaml = _find_yaml(Path(source))
    if yaml is None:
        return ["shardrun", "generate", f"checkpoint={output}", "prompt=I love Beijing, because"]
    size = prepared_size(output)
    if size == 1:
        return [*predict, "single", str(yaml), str(output)]
    return [*predict, "parallel", str(yaml), str(output), str(size)]


def _find_yaml(source: Path) -> Path | None:
    if source.is_dir():
        return find_model_file(source) if is_model_file(source) else None
    return source
