"""Text to tokens and back: SentencePiece's `tokenizer.model` and the `tokenizers` library's JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Protocol

from parallel.checkpoint.json_file import read_json_object
from parallel.checkpoint.regular_file import check_regular, reason
from parallel.errors import CheckpointError, PromptError


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the begin-of-sequence token where the model wants one."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        ...


# tokenizer.json first, because it knows added tokens.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a directory, or that of one file: a .json, or SentencePiece's of any name.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    file = path
    if os.path.isdir(path):
        found = [path / name for name in TOKENIZER_FILES if (path / name).exists()]
        if not found:
            raise CheckpointError(
                f"{path} has no tokenizer.json and no tokenizer.model; copy one beside the weights, or "
                "write tokenizer=PATH."
            )
        file = found[0]
    check_regular(file)
    try:
        return _JsonTokenizer(file) if file.suffix == ".json" else _SentencePiece(file)
    except CheckpointError:
        raise
    except Exception as error:  # both libraries raise bare Exception and RuntimeError
        raise CheckpointError(
            f"{file} is not a readable tokenizer ({reason(error)}); copy it again."
        ) from error


def num_shared(*token_ids: Sequence[int]) -> int:
    """How many first tokens all the texts have in common."""
    places = enumerate(zip(*token_ids, strict=False))
    unlike = (place for place, tokens in places if len(set(tokens)) > 1)
    return next(unlike, min(map(len, token_ids)))


class _SentencePiece:
    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor: Any = SentencePieceProcessor(model_file=str(file))
        options = file.with_name("tokenizer_config.json")
        values = read_json_object(options) if options.exists() else {}
        adds_bos = values.get("add_bos_token", True)
        if type(adds_bos) not in (bool, NoneType):
            raise CheckpointError(
                f"{options}: add_bos_token must be true or false, but is {adds_bos!r}; correct it."
            )
        self._adds_bos = bool(adds_bos) and self._processor.bos_id() >= 0

    def encode(self, text: str) -> list[int]:
        ids = list(self._processor.encode(text))
        return [self._processor.bos_id(), *ids] if self._adds_bos else ids

    def decode(self, token_ids: Sequence[int]) -> str:
        # A model's vocabulary may be padded beyond the tokenizer's.
        known = [int(token) for token in token_ids if token < self._processor.vocab_size()]
        return str(self._processor.decode(known))


class _JsonTokenizer:
    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Library

        self._library: Any = Library.from_file(str(file))
        # A file saved after fine-tuning may carry both; a prompt is never clipped or padded.
        self._library.no_truncation()
        self._library.no_padding()

    def encode(self, text: str) -> list[int]:
        try:
            return list(self._library.encode(text).ids)
        except Exception as error:  # the library raises it bare, as for a vocabulary without [UNK]
            raise PromptError(
                f"{text[:40]!r} cannot be tokenized ({reason(error)}); use another tokenizer.json."
            ) from error

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._library.decode(list(token_ids), skip_special_tokens=True))


class TextStream:
    """Text as it grows, token by token.

    A token may be half a character or change the one before it (SentencePiece's spaces), so a
    window of undecided tokens is decoded again until it ends in a whole character.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids)
        self._window = max(0, len(self._ids) - 6)
        self._decided = len(self._ids)
        self._stop = tuple(stop)
        self._emitted = 0
        self.text = ""

    def add(self, token: int) -> tuple[str, bool]:
        """Take a token; returns the new text and whether a stop string was met (and cut off)."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._window : self._decided])
        now = self._tokenizer.decode(self._ids[self._window :])
        if now.endswith("\ufffd") or len(now) <= len(before):
            return "", False
        self._window, self._decided = self._decided, len(self._ids)
        return self._extend(now[len(before) :])

    def finish(self) -> str:
        """What was held back: half a character, or the beginning of a stop string."""
        before = self._tokenizer.decode(self._ids[self._window : self._decided])
        rest = self._tokenizer.decode(self._ids[self._window :])[len(before) :]
        self._decided = len(self._ids)
        self.text += rest
        return self._emit(len(self.text))

    def _extend(self, new: str) -> tuple[str, bool]:
        self.text += new
        found = [cut for word in self._stop if (cut := self.text.find(word, self._emitted)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            return self._emit(len(self.text)), True
        return self._emit(len(self.text) - self._held_back()), False

    def _held_back(self) -> int:
        """How much of the end may become a stop string, and must not be shown yet."""
        lengths = (
            length
            for word in self._stop
            for length in range(len(word) - 1, 0, -1)
            if self.text.endswith(word[:length])
        )
        return max(lengths, default=0)

    def _emit(self, end: int) -> str:
        start, self._emitted = self._emitted, max(self._emitted, end)
        return self.text[start : self._emitted]
