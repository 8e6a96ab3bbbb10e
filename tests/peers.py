"""Which tests stand on libraries that others release: read from the tests, so that no list goes stale.

They are marked `peers`, and CI passes them once more with the newest versions.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = frozenset({"transformers", "compressed_tensors", "tokenizers"})


@cache
def users(path: Path) -> frozenset[str]:
    """What a file defines or imports by which a peer is used: tests, fixtures, helpers, names."""
    found = set(PEERS)
    mentions: dict[str, set[str]] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
            of_helper = users(ROOT / f"{node.module.replace('.', '/')}.py")
            found |= {alias.asname or alias.name for alias in node.names if alias.name in of_helper}
        else:
            mentions |= dict.fromkeys(_defined(node), _mentioned(node))
    while more := {name for name, said in mentions.items() if said & found} - found:
        found |= more
    return frozenset(found)


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
    return [name.id for name in ast.walk(node) if isinstance(name, ast.Name)
            and isinstance(name.ctx, ast.Store)]  # fmt: skip


def _mentioned(node: ast.stmt) -> set[str]:
    """The names in it, those of fixtures, which are arguments, and of modules among them."""
    said: set[str] = set()
    for part in ast.walk(node):
        match part:
            case ast.Name(id=name) | ast.arg(arg=name):
                said.add(name)
            case (
                ast.alias(name=name)
                | ast.ImportFrom(module=str(name))
                | ast.Call(
                    func=ast.Attribute(attr="importorskip"), args=[ast.Constant(value=str(name))]
                )
            ):
                said.add(name.partition(".")[0])
    return said
