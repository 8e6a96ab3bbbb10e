"""Which kind of tokenizer a checkpoint has."""

from __future__ import annotations

from pathlib import Path

from launcher.text.json_tokenizer import JsonTokenizer
from launcher.text.sentencepiece_tokenizer import SentencePieceTokenizer
from launcher.text.tokenizer import Tokenizer
from parallel.checkpoint.regular_file import check_regular, reason
from parallel.errors import CheckpointError

# The largest that are published have some 20 MB.
_MOST_BYTES = 256 << 20


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint.

    What says more of its tokens (tokenizer_config.json and its like) is read from the same directory.

    Args:
        path: the checkpoint's directory, where tokenizer.json is taken before tokenizer.model; or the
            file itself, a SentencePiece model unless it ends in .json.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    file = _file_of(path) if path.is_dir() else path
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
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).exists():
            return directory / name
    raise CheckpointError(
        f"{directory} has no tokenizer.json and no tokenizer.model; copy one beside the weights."
    )
