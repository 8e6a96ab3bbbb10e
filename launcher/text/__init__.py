"""Text to tokens and back: one file for each kind of tokenizer, and an answer's text as it grows."""

from launcher.text.open import open_tokenizer
from launcher.text.stream import TextStream
from launcher.text.tokenizer import Tokenizer, num_shared

__all__ = ["TextStream", "Tokenizer", "num_shared", "open_tokenizer"]
