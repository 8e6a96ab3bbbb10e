"""What the tasks need of a tokenizer, whatever its file."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence


class Tokenizer(ABC):
    """Token ids of a text, and what each token adds to a text.

    Attributes:
        special_ids: the special tokens of the vocabulary, by how they are written.
        strips_space: whether a text loses the space that it begins with, which encode had put there.
    """

    special_ids: Mapping[str, int]
    strips_space: bool

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the begin-of-sequence token where the model wants one."""

    @abstractmethod
    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text, in UTF-8: perhaps a part of a character only.

        Nothing for a special token, and for an id that the tokenizer does not know: a model's
        vocabulary may be padded beyond the tokenizer's.
        """

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens; U+FFFD stands for what is not UTF-8, once a cut character."""
        decoding = Decoding(self)
        return decoding.add(token_ids) + decoding.finish()


class Decoding:
    """Text of tokens that come one after another: what add gave stays as it is."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips_space = tokenizer.strips_space

    @property
    def is_inside_character(self) -> bool:
        """Whether the tokens so far end in the middle of a character, which no add gave yet."""
        return bool(self._utf8.getstate()[0])

    def add(self, token_ids: Iterable[int]) -> str:
        """The characters that these tokens complete."""
        return self._next(b"".join(map(self._bytes_of, token_ids)))

    def finish(self) -> str:
        """U+FFFD where the last character is cut."""
        return self._next(b"", is_last=True)

    def _next(self, data: bytes, *, is_last: bool = False) -> str:
        text = self._utf8.decode(data, is_last)
        if text and self._strips_space:
            self._strips_space = False
            return text.removeprefix(" ")
        return text


def num_shared(*token_ids: Sequence[int]) -> int:
    """How many first tokens all the texts have in common."""
    places = enumerate(zip(*token_ids, strict=False))
    unlike = (place for place, tokens in places if len(set(tokens)) > 1)
    return next(unlike, min(map(len, token_ids)))
