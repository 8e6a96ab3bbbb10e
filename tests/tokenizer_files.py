"""Tokenizer files as they are published, made small, and random texts to try them on."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.resolve import DEMO

LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
}
# The words that Llama 3 splits a text into; Qwen's numbers have one digit.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_WORDS = _LLAMA3_WORDS.replace("{1,3}", "")
_FRAGMENTS = [
    "Once", " upon", " a time", "don't", "1234", "中文", "北京", "हिन्दी", "é", "ñ", "ﬁ", "Ａ", "😀",
    "🤔", "👩‍👩‍👧", "\n", "\n\n", "\r\n", "\t", " ", "  ", "   ", "\x00", "\x07", "\u200b", "\ufffd",
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|left|>", "<|right|>", "<tool>", "word",
]  # fmt: skip


def random_texts(number: int, seed: int = 0) -> Iterator[str]:
    """Texts of words, emoji, control characters, special tokens and any other character."""
    source = random.Random(seed)
    for _ in range(number):
        length = source.randrange(24)
        yield "".join(
            source.choice(_FRAGMENTS) if source.random() < 0.8 else _character(source)
            for _ in range(length)
        )


def _character(source: random.Random) -> str:
    """One that is not half a surrogate pair, nor SentencePiece's own sign for a space."""
    places = ((0x20, 0x7F), (0x01, 0x2581), (0x2582, 0xD800), (0xE000, 0x110000))
    return chr(source.randrange(*source.choice(places)))


def flags(content: str, **values: bool) -> dict[str, Any]:
    """An entry of added_tokens_decoder."""
    names = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return {"content": content, **dict.fromkeys(names, False), **values}


def sentencepiece(
    folder: Path, model: Path = DEMO / "tokenizer.model", config: Any = None, **files: Any
) -> Path:
    """A directory with a `tokenizer.model`; `files` are JSON files by their names without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model, folder / "tokenizer.model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if config is not None:
        files["tokenizer_config"] = config
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def user_defined_model(path: Path) -> Path:
    """A SentencePiece model with pieces of its own kind: `<tool>` is text, `<|left|>` is not."""
    from sentencepiece import SentencePieceTrainer

    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter((DEMO / "held_out.txt").read_text().splitlines()[:300]),
            model_writer=file,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=["<tool>"],
            control_symbols=["<|left|>"],
            minloglevel=2,
        )
    return path


def byte_fallback(folder: Path, prefix: str | None = None) -> Path:
    """tokenizer.json as Llama 2's: SentencePiece's pieces, and a token for each byte.

    Args:
        prefix: which parts of a text transformers 5 puts a space before, "always" or "first"; without
            it the file is as those of transformers 4.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )  # fmt: skip

    processor = SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    vocabulary = {processor.id_to_piece(token): token for token in range(processor.vocab_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocabulary
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    library = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if prefix is None:
        library.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace("▁", prefix, split=False)
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    library.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    )
    library.add_tokens([AddedToken("<tool>"), AddedToken("<|im_start|>", special=True)])
    return _save(library, folder)


def llama3(folder: Path) -> Path:
    """tokenizer.json as Llama 3's: BPE of bytes, and a template that puts BOS before a text."""
    return _byte_level(folder, _LLAMA3_WORDS, bos="<s>")


def qwen(folder: Path) -> Path:
    """tokenizer.json as Qwen's: BPE of bytes of normalized text, without BOS."""
    return _byte_level(folder, _QWEN_WORDS, bos=None)


def _byte_level(folder: Path, words: str, bos: str | None) -> Path:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )  # fmt: skip

    library = Tokenizer(models.BPE(ignore_merges=bos is not None))
    if bos is None:
        library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    lines = [*(DEMO / "held_out.txt").read_text().splitlines()[:300], *["中文 北京 😀"] * 20]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    library.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in special]
    )
    library.add_tokens([AddedToken(text, normalized=False) for text in ("<tool>", "é中")])
    steps = [processors.ByteLevel(trim_offsets=False)]
    if bos is not None:
        pair = (bos, library.token_to_id(bos))
        steps.append(processors.TemplateProcessing(f"{bos} $A", special_tokens=[pair]))
    library.post_processor = processors.Sequence(steps)
    return _save(library, folder)


def _save(library: Any, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    # The class that takes the file as it is.
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder
