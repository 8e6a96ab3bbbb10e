"""An answer's text as it grows, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.text.tokenizer import Decoding, Tokenizer


class TextStream:
    """Text of an answer, token by token.

    It is the decode of prompt and answer from where that parts from the decode of the prompt alone.
    So a character that the prompt begins and the answer completes belongs to the answer, and one
    that stays broken is the prompt's. A token costs the same however long the text has grown.

    The text ends before the first stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._decoding = Decoding(tokenizer)
        self._decoding.add(prompt_ids)
        self._may_repeat_prompt = self._decoding.is_inside_character
        self._stop = tuple(stop)
        self._is_stopped = False
        self._shown: list[str] = []
        self._held = ""

    @property
    def text(self) -> str:
        """What add and finish have returned so far."""
        return "".join(self._shown)

    def add(self, token: int) -> tuple[str, bool]:
        """Take a token; returns the new text and whether a stop string was met (and cut off)."""
        self._held += self._beyond_prompt(self._decoding.add([token]))
        found = [cut for word in self._stop if (cut := self._held.find(word)) >= 0]
        self._is_stopped = bool(found)
        return self._show(min(found, default=self._num_sure())), self._is_stopped

    def finish(self) -> str:
        """What was held back: half a character, or the beginning of a stop string."""
        if self._is_stopped:
            return ""
        self._held += self._beyond_prompt(self._decoding.finish())
        return self._show(len(self._held))

    def _beyond_prompt(self, new: str) -> str:
        """Without the U+FFFD that the prompt's own decode ends with."""
        if new and self._may_repeat_prompt:
            self._may_repeat_prompt = False
            return new.removeprefix("\ufffd")
        return new

    def _num_sure(self) -> int:
        """How many characters cannot be the beginning of a stop string."""
        lengths = (
            length
            for word in self._stop
            for length in range(len(word) - 1, 0, -1)
            if self._held.endswith(word[:length])
        )
        return len(self._held) - max(lengths, default=0)

    def _show(self, end: int) -> str:
        new, self._held = self._held[:end], self._held[end:]
        self._shown.append(new)
        return new
