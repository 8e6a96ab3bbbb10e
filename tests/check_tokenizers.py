"""Ids and text beside transformers' on 2,000 random texts: python -m tests.check_tokenizers [NUMBER].

It needs transformers 5 and, for `tokenizer.model`, protobuf. A part of the texts is in the suite.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from launcher.text import open_tokenizer
from tests import tokenizer_files
from tests.tokenizer_files import LLAMA, flags, random_texts, sentencepiece

# Behind the demo's 2,048 pieces.
ADDED = {"<|im_start|>": 2048, "<|im_end|>": 2049, "<tool>": 2050}
DECODER = {
    "0": flags("<unk>", special=True),
    "1": flags("<s>", special=True, normalized=True),
    "2048": flags("<|im_start|>", special=True),
    "2049": flags("<|im_end|>", normalized=True),
    "2050": flags("<|left|>", lstrip=True, special=True),
    "2051": flags("<|right|>", rstrip=True, normalized=True),
    "2052": flags("word", single_word=True),
}
Maker = Callable[[Path], Path]


def _with_kinds_of_its_own(folder: Path, config: dict[str, Any]) -> Path:
    model = tokenizer_files.user_defined_model(folder / "source.model")
    return sentencepiece(folder, model, config)


CASES: dict[str, Maker] = {
    "model, legacy": partial(sentencepiece, config={**LLAMA, "legacy": True}),
    "model, not legacy": partial(sentencepiece, config=LLAMA),
    "model, no prefix": partial(sentencepiece, config={**LLAMA, "add_prefix_space": False}),
    "model, end of sequence": partial(sentencepiece, config={**LLAMA, "add_eos_token": True}),
    "model, no class": partial(sentencepiece, config={"add_bos_token": True}),
    "model, added_tokens.json": partial(
        sentencepiece, config=LLAMA, added_tokens=ADDED, special_tokens_map={"pad_token": "<tool>"}
    ),
    "model, added_tokens_decoder": partial(
        sentencepiece, config={**LLAMA, "legacy": True, "added_tokens_decoder": DECODER}
    ),
    "model, no class, added_tokens_decoder": partial(
        sentencepiece, config={"add_bos_token": True, "added_tokens_decoder": DECODER}
    ),
    "model, names without ids": partial(
        sentencepiece,
        config={**LLAMA, "pad_token": "<tool>", "additional_special_tokens": ["<|im_start|>"]},
    ),
    "model, pieces of its own kinds": partial(_with_kinds_of_its_own, config=LLAMA),
    "model, no class, pieces of its own kinds": partial(
        _with_kinds_of_its_own, config={"add_bos_token": True}
    ),
    "json, byte fallback": tokenizer_files.byte_fallback,
    "json, bytes as Llama 3": tokenizer_files.llama3,
    "json, bytes as Qwen": tokenizer_files.qwen,
}


def differences(case: str | Maker, folder: Path, number: int) -> list[tuple[str, Any, Any]]:
    """(text, ours, theirs) for each random text whose ids or decoded text differ."""
    from transformers import AutoTokenizer

    path = (CASES[case] if isinstance(case, str) else case)(folder)
    theirs = AutoTokenizer.from_pretrained(str(path))
    ours = open_tokenizer(path)
    found = []
    for text in random_texts(number):
        mine, other = ours.encode(text), theirs(text).input_ids
        pair = (mine, ours.decode(other)), (other, theirs.decode(other, skip_special_tokens=True))
        if pair[0] != pair[1]:
            found.append((text, *pair))
    return found


def main(number: int) -> int:
    failed = False
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = differences(name, Path(folder), number)
        print(f"{name}: {len(found)} of {number} differ", *map(repr, found[:3]), sep="\n  ")
        failed |= bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000))
