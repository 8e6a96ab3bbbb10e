"""Texts of any length in the rendezvous store, whose server ends a connection that sends it 8 MB."""

from __future__ import annotations

from typing import Protocol

# Of at most 4 bytes each in UTF-8: half of what the server takes.
_PIECE_CHARACTERS = 1 << 20


class Store(Protocol):
    """What is used of torch's store."""

    def set(self, key: str, value: str) -> object: ...

    def get(self, key: str) -> bytes: ...


def set_text(store: Store, key: str, text: str) -> None:
    """Lay a text down in pieces; the key itself comes last, so that who finds it finds all."""
    starts = range(0, len(text), _PIECE_CHARACTERS)
    for number, start in enumerate(starts):
        store.set(f"{key}/{number}", text[start : start + _PIECE_CHARACTERS])
    store.set(key, str(len(starts)))


def get_text(store: Store, key: str) -> str:
    """What `set_text` laid down; waits for it as the store does."""
    num_pieces = int(store.get(key))
    return "".join(store.get(f"{key}/{number}").decode() for number in range(num_pieces))
