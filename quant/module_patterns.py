"""Patterns on module paths, as `modules_to_not_convert` and `layer_policies` write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from quant.errors import QuantError

# Names that mean one thing in MindFormers' files and another word in a Hugging Face checkpoint.
MINDFORMERS_MODULES: Mapping[str, str] = {
    "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
    "attention": "self_attn", "feed_forward": "mlp",
}  # fmt: skip


def translate_mindformers(pattern: str) -> str:
    """`w2` -> `down_proj`, `model.layers.0.attention.wo` -> `model.layers.0.self_attn.o_proj`."""
    return ".".join(MINDFORMERS_MODULES.get(part, part) for part in pattern.split("."))


def match_or_refuse(key: str, pattern: str, modules: tuple[str, ...]) -> set[str]:
    """The modules whose whole path or last component a pattern matches (fnmatch).

    Args:
        key: the field of `quant` that holds the pattern.

    Raises:
        QuantError: it matches none, and would be ignored.
    """
    hits = {name for name in modules if _matches(name, translate_mindformers(pattern))}
    if hits:
        return hits
    known = map(_both_names, sorted({_last(name) for name in modules}))
    raise QuantError(
        f"`quant.{key}` has the pattern {pattern!r}, which matches no module; "
        f"write a module path or one of {', '.join(known)}."
    )


def _both_names(name: str) -> str:
    """`down_proj (w2)`: Hugging Face's, and the one that Meta's and MindFormers' files have."""
    theirs = [word for word, ours in MINDFORMERS_MODULES.items() if ours == name]
    return f"{name} ({theirs[0]})" if theirs else name


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(_last(name), pattern)


def cover(members: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Patterns that match `members` and none of the other modules.

    A last component where it stands for members alone, as in `down_proj`; else whole paths.
    """
    members = list(members)
    others = {_last(name) for name in set(modules) - set(members)}
    return list(dict.fromkeys(name if _last(name) in others else _last(name) for name in members))


def _last(name: str) -> str:
    return name.rpartition(".")[2]
