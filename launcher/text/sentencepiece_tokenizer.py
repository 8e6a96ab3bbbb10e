"""`tokenizer.model`: a SentencePiece model, with the tokens that the files beside it add.

There are two ways to read one, and transformers takes the first for the class LlamaTokenizer:

- Llama's: the text is taken as it is, and a chunk of it begins with a space unless it has one: every
  chunk between two added tokens with `legacy`, the text's first one alone without.
- SentencePiece's own: the model's normalizer and its dummy prefix, for each chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from launcher.text.added_tokens import AddedToken, read_added_tokens
from launcher.text.tokenizer import Tokenizer
from parallel.checkpoint.json_file import read_json_object
from parallel.errors import CheckpointError

_SPACE = "\u2581"
# Messages of protobuf may be written in parts, of which the last one wins: behind a model this says
# normalizer_spec { precompiled_charsmap: "" add_dummy_prefix: false remove_extra_whitespaces: false }.
_AS_TYPED = b"\x1a\x06\x12\x00\x18\x00\x20\x00"
_USER_DEFINED = b"\x18\x04"  # the field "type" of a piece, with the value USER_DEFINED


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        config_path = file.with_name("tokenizer_config.json")
        config = read_json_object(config_path) if config_path.exists() else {}
        model = file.read_bytes()
        is_llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
        self._processor: Any = SentencePieceProcessor(
            model_proto=model + _AS_TYPED if is_llama else model
        )
        self._pieces = _Pieces(self._processor)
        own = self._pieces.special()
        if is_llama:
            own |= {number: AddedToken(text) for number, text in _user_defined(model)}
        self._added = read_added_tokens(file.parent, config, self._pieces, own)
        self.special_ids = {
            token.content: number for number, token in self._added.by_id.items() if token.special
        }
        if is_llama:
            self.strips_space = _flag(config_path, config, "add_prefix_space") is not False
        else:
            self.strips_space = self._processor.normalize("a").startswith(_SPACE)
        self._puts_space = is_llama and self.strips_space
        self._puts_every_space = bool(_flag(config_path, config, "legacy"))
        self._first = self._end_token(config_path, config, "bos", default=True)
        self._last = self._end_token(config_path, config, "eos", default=False)

    def encode(self, text: str) -> list[int]:
        return [*self._first, *self._ids(text), *self._last]

    def bytes_of(self, token: int) -> bytes:
        added = self._added.by_id.get(token)
        if added is not None:
            return b"" if added.special else _text_bytes(added.content)
        piece = self._pieces.text_of(token)
        if piece is None:
            return b""
        return (
            bytes([int(piece[1:-1], 16)]) if self._processor.is_byte(token) else _text_bytes(piece)
        )

    def _ids(self, text: str) -> Iterator[int]:
        end = 0
        for token, start, stop in self._added.find(text):
            yield from self._chunk_ids(text[end:start], is_first=end == 0)
            yield token
            end = stop
        yield from self._chunk_ids(text[end:], is_first=end == 0)

    def _chunk_ids(self, text: str, *, is_first: bool) -> Sequence[int]:
        if not text:
            return ()
        if (
            self._puts_space
            and (is_first or self._puts_every_space)
            and not text.startswith((" ", _SPACE))
        ):
            text = _SPACE + text
        return list(self._processor.encode(text))

    def _end_token(
        self, path: Path, config: dict[str, Any], name: str, *, default: bool
    ) -> tuple[int, ...]:
        """What stands before (bos) or behind (eos) every text."""
        if not _flag(path, config, f"add_{name}_token", default):
            return ()
        number = self._added.roles.get(f"{name}_token", getattr(self._processor, f"{name}_id")())
        return (number,) if number >= 0 else ()


class _Pieces:
    """The vocabulary of the model itself."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._size = processor.vocab_size()

    def __len__(self) -> int:
        return int(self._size)

    def text_of(self, token: int) -> str | None:
        return str(self._processor.id_to_piece(token)) if 0 <= token < self._size else None

    def id_of(self, text: str) -> int | None:
        token = int(self._processor.piece_to_id(text))  # of the unknown one where there is none
        return token if self.text_of(token) == text else None

    def special(self) -> dict[int, AddedToken]:
        """Those that stand for no text: `<s>`, `</s>`, `<unk>`."""
        numbers = list(range(self._size))
        kinds = zip(
            numbers, self._processor.is_control(numbers), self._processor.is_unknown(numbers),
            strict=True,
        )  # fmt: skip
        return {
            number: AddedToken(self._processor.id_to_piece(number), special=True)
            for number, *is_special in kinds
            if any(is_special)
        }


def _text_bytes(piece: str) -> bytes:
    return piece.replace(_SPACE, " ").encode()


def _flag(
    path: Path, config: dict[str, Any], name: str, default: bool | None = None
) -> bool | None:
    value: bool | None = config.get(name, default)
    if type(value) not in (bool, NoneType):
        raise CheckpointError(
            f"{path}: {name} must be true or false, but is {value!r}; correct it."
        )
    return value


def _user_defined(model: bytes) -> Iterator[tuple[int, str]]:
    """(id, text) of the pieces that are never parted; the library knows them, but does not tell."""
    pieces = (value for number, value in _fields(model) if number == 1)
    for token, piece in enumerate(pieces):
        if _USER_DEFINED in piece and (fields := dict(_fields(piece))).get(3) == 4:
            yield token, fields[1].decode()


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message that the library has read before."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == 0:
            value: Any
            value, place = _varint(message, place)
        else:
            if kind == 2:
                size, place = _varint(message, place)
            else:
                size = {1: 8, 5: 4}[kind]
            value = message[place : place + size]
            place += size
        yield tag >> 3, value


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
