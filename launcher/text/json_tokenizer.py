"""`tokenizer.json`, by the `tokenizers` library."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from launcher.text.tokenizer import Tokenizer
from parallel.checkpoint.regular_file import reason
from parallel.errors import CheckpointError, PromptError


class JsonTokenizer(Tokenizer):
    """A tokenizer of the library, of which `decode` is done here.

    The library's own cannot be taken token by token: it turns a whole run of byte tokens into
    U+FFFD where the last character is cut, those before it included.
    """

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Library

        self._library: Any = Library.from_file(str(file))
        # A file saved after fine-tuning may carry both; a prompt is never clipped or padded.
        self._library.no_truncation()
        self._library.no_padding()
        added = self._library.get_added_tokens_decoder()
        self.special_ids = {
            token.content: number for number, token in added.items() if token.special
        }
        self._special = frozenset(self.special_ids.values())
        self._decoder = _Decoder(file, self._library.decoder)
        self.strips_space = self._decoder.strips_space

    def encode(self, text: str) -> list[int]:
        try:
            return list(self._library.encode(text).ids)
        except Exception as error:  # the library raises it bare, as for a vocabulary without [UNK]
            raise PromptError(
                f"{text[:40]!r} cannot be tokenized ({reason(error)}); use another tokenizer.json."
            ) from error

    def bytes_of(self, token: int) -> bytes:
        piece = None if token in self._special else self._library.id_to_token(token)
        return b"" if piece is None else self._decoder.bytes_of(piece)


class _Decoder:
    """What the decoder of a tokenizer.json makes of one token.

    Attributes:
        strips_space: whether it takes the space that the text begins with.
    """

    def __init__(self, file: Path, decoder: Any) -> None:
        self._replaced: list[tuple[str, str]] = []
        self._is_byte_level = self._has_byte_tokens = self.strips_space = False
        self._before = ""
        if decoder is None:  # the library puts spaces between tokens
            self._before, self.strips_space = " ", True
            return
        # The library shows a decoder's settings only as what it would pickle, which is JSON.
        settings = json.loads(decoder.__getstate__())
        for step in settings.get("decoders", [settings]):
            if not self._takes(step):
                raise CheckpointError(
                    f"{file}: its decoder must be of the steps ByteLevel, ByteFallback, Fuse, "
                    f"Metaspace, Replace and Strip as Llama, Mistral and Qwen have them, but has "
                    f"{json.dumps(step)}; use the tokenizer.json of such a model."
                )

    def bytes_of(self, piece: str) -> bytes:
        if self._is_byte_level:
            return _byte_level(piece)
        for old, new in self._replaced:
            piece = piece.replace(old, new)
        if self._has_byte_tokens and re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return (self._before + piece).encode()

    def _takes(self, step: dict[str, Any]) -> bool:
        """Note what a step does; False where it is not known."""
        match step:
            case {"type": "ByteLevel"}:
                self._is_byte_level = True
            case {"type": "ByteFallback"}:
                self._has_byte_tokens = True
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                self._replaced.append((old, new))
            case {"type": "Metaspace", "replacement": old, "prepend_scheme": scheme}:
                self._replaced.append((old, " "))
                self.strips_space = scheme != "never"
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                self.strips_space = True
            case {"type": "Fuse"}:
                pass
            case _:
                return False
        return True


def _byte_level(piece: str) -> bytes:
    """Bytes of a token that has a visible character for each; an added token is text as it is."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, piece))
    except KeyError:
        return piece.encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's: visible characters of Latin-1 stand for themselves, and others for the rest in turn."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted({*range(0x100)} - {*visible})
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + place): byte for place, byte in enumerate(hidden)
    }


_BYTE_OF = _byte_characters()
