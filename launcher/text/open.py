"""Which kind of tokenizer a checkpoint has."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.text.json_tokenizer import JsonTokenizer
from launcher.text.sentencepiece_tokenizer import SentencePieceTokenizer
from launcher.text.tokenizer import Tokenizer
from parallel.checkpoint.regular_file import check_regular, reason
from parallel.errors import CheckpointError

# The largest that are published have some 20 MB.
_MOST_BYTES = 256 << 20
# The first knows more of the tokens.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint.

    What says more of its tokens (tokenizer_config.json and its like) is read from the same directory.

    Args:
        path: the checkpoint's directory, with one of TOKENIZER_FILES; or the
            file itself, a SentencePiece model unless it ends in .json.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    file = _file_of(path) if os.path.isdir(path) else path
    check_regular(file, _MOST_BYTES)
    try:
        return JsonTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)
    except CheckpointError:
        raise
    except Exception as error:  # both libraries raise bare Exception and RuntimeError
        raise CheckpointError(
            f"{file} is not a readable tokenizer ({reason(error)}); copy it again."
        ) from error


def _file_of(directory: Path) -> Path:
    for name in TOKENIZER_FILES:
        if (directory / name).exists():
            return directory / name
    raise CheckpointError(
        f"{directory} has no tokenizer.json and no tokenizer.model; copy one beside the weights, or "
        "write tokenizer=PATH."
    )
