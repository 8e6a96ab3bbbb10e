"""Perplexity of a text by a sliding window.

The protocol is that of Hugging Face's guide "Perplexity of fixed-length models": windows begin
every `stride` tokens; each scores the tokens that no window before it has seen, and reads the others
as context alone. A window's first token has no context in it and is never scored, so with a stride
of the whole window one token of each window is left out. Every scored token counts once and alike
(the guide's own loop gives the windows after the first the weight of one token too few).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel.generation.cache import KVCache
from parallel.generation.loss import Loss
from parallel.generation.score import Run, token_log_probs
from parallel.model.decoder import Decoder


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of a text, of which those from `first` on are scored."""

    start: int
    stop: int
    first: int

    @property
    def num_scored(self) -> int:
        return self.stop - self.first


def cut_windows(num_tokens: int, length: int, stride: int) -> Iterator[Window]:
    """The windows that score something, in order; each token but the unscored ones is in one.

    Args:
        length: of a window in tokens, at least 2; the last may be shorter.
        stride: from one window's beginning to the next, 1 to `length`.
    """
    assert length >= 2, length
    assert 1 <= stride <= length, (stride, length)
    seen = 0
    for start in range(0, num_tokens, stride):
        window = Window(start, min(start + length, num_tokens), max(seen, start + 1))
        if window.num_scored:
            yield window
        if window.stop == num_tokens:
            return
        seen = window.stop


def window_loss(
    decoder: Decoder, cache: KVCache, token_ids: Sequence[int], window: Window, chunk: int
) -> Loss:
    """The loss of one window's scored tokens; of no tokens but on rank 0.

    Args:
        cache: its first row, as long as the window, is overwritten.
        token_ids: of the whole text.
        chunk: most tokens of one step.
    """
    run = Run(0, 0, token_ids[window.start : window.stop - 1], window.num_scored)
    targets = token_ids[window.first : window.stop]
    found_S = token_log_probs(decoder, cache, [run], targets, chunk)
    return Loss(0.0, 0) if found_S is None else Loss(-float(found_S.sum()), len(found_S))
