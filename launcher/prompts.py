"""The prompts of a run: from the command line, a file or stdin, as token ids that fit the context."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from types import NoneType
from typing import Any

from launcher.failures import ConfigError
from launcher.job import Prompt
from launcher.schema import Config, GenerationSection
from launcher.text import Tokenizer
from launcher.text_file import beginning, has_lone_surrogate, json_lines, read_text
from parallel.errors import PromptError

DEMO_PROMPTS = ["I love Beijing, because", "LLaMA is a", "Huawei is a company that"]
DEFAULT_NEW_TOKENS = 128
# Other fields of a .jsonl line, such as a category, are the user's own; these would be missed.
_GENERATION_KEYS = {item.name for item in fields(GenerationSection)}


def make_prompts(
    config: Config, tokenizer: Tokenizer, context: int, default: list[str] | None
) -> tuple[Prompt, ...]:
    """Read and tokenize every prompt.

    Args:
        context: the model's longest sequence in tokens.
        default: prompts where none is given, or None if some must be.

    Raises:
        ConfigError: none or more than one of prompt, prompts, prompts_file; a file that is unread; a
            stop string that no text has.
        PromptError: a prompt that is empty of tokens, or does not fit with its answer.
    """
    _check_stop(config.generation.stop, tokenizer)
    prompts = []
    for index, (name, text) in enumerate(_texts(config, default)):
        _check_characters(index, name, text)
        prompts.append(_prompt(config, index, name, text, tokenizer.encode(text), context))
    return tuple(prompts)


def _check_stop(stop: Sequence[str], tokenizer: Tokenizer) -> None:
    """A special token alone stops by its id; beside other text it would be looked for in vain."""
    for word in stop:
        within = [special for special in tokenizer.special_ids if special in word]
        if within and word not in within:
            raise ConfigError(
                f"`generation.stop` {beginning(word)} holds the special token {max(within, key=len)!r}, "
                "which the text of an answer leaves out; write that token alone, or the text alone."
            )


def _texts(config: Config, default: list[str] | None) -> list[tuple[Any, str]]:
    """(id, text) of each prompt."""
    given = {
        "prompt": config.prompt,
        "prompts": config.prompts,
        "prompts_file": config.prompts_file,
    }
    named = [key for key, value in given.items() if value is not None]
    if len(named) > 1:
        raise ConfigError(f"`{named[0]}` and `{named[1]}` are both given; give one of them.")
    if not named and default is None:
        raise ConfigError("no prompt is given; write prompt='…' or prompts_file=FILE.")
    if config.prompts_file is not None:
        return _file_texts(config.prompts_file)
    if config.prompt is not None:
        return [(None, config.prompt)]
    texts = config.prompts if config.prompts is not None else default
    assert texts is not None
    if not texts:
        raise ConfigError("`prompts` is an empty list; write prompts=['one','two'].")
    return [(None, text) for text in texts]


def _file_texts(name: str) -> list[tuple[Any, str]]:
    text = read_text("prompts_file", name)
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise ConfigError(f"`prompts_file` {name} holds no prompt; write one a line.")
    if name.endswith(".jsonl"):
        return list(_jsonl_texts(name, text))
    return [(None, line) for line in lines]


def _jsonl_texts(name: str, text: str) -> Iterator[tuple[Any, str]]:
    for number, line, entry in json_lines(text):
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ConfigError(
                f"`prompts_file` {name}, line {number}, must be a JSON object with a `prompt` "
                f"string, but is {beginning(line)}; correct it."
            )
        if type(entry.get("id")) not in (str, int, NoneType):
            raise ConfigError(
                f"`prompts_file` {name}, line {number}: `id` must be a string or an integer, but "
                f"is {reprlib.repr(entry['id'])}; correct it."
            )
        ignored = sorted(entry.keys() & _GENERATION_KEYS)
        if ignored:
            raise ConfigError(
                f"`prompts_file` {name}, line {number}: {ignored[0]} cannot be set for one prompt; "
                f"set generation.{ignored[0]} for all of them."
            )
        yield entry.get("id"), entry["prompt"]


def _check_characters(index: int, *texts: object) -> None:
    for text in texts:
        if isinstance(text, str) and has_lone_surrogate(text):
            raise PromptError(
                f"prompt {index} must be UTF-8 text, but has a lone surrogate: "
                f"{beginning(text)}; write the character itself."
            )


def _prompt(
    config: Config, index: int, name: Any, text: str, token_ids: list[int], context: int
) -> Prompt:
    if not token_ids:
        raise PromptError(f"prompt {index} ({beginning(text)}) has no tokens; write some text.")
    room = context - len(token_ids)
    if room < 1:
        raise PromptError(
            f"prompt {index} ({beginning(text)}) has {len(token_ids)} tokens, but the context is "
            f"{context} tokens and an answer needs at least one; shorten it."
        )
    return Prompt(
        index, name, text, tuple(token_ids), _answer_length(config, index, room, token_ids)
    )


def _answer_length(config: Config, index: int, room: int, token_ids: list[int]) -> int:
    """max_new_tokens or max_length as asked for; the default is cut to the context, they are not."""
    generation = config.generation
    wanted = generation.max_new_tokens
    if generation.max_length is not None:
        wanted = generation.max_length - len(token_ids)
        if wanted < 1:
            raise PromptError(
                f"prompt {index} has {len(token_ids)} tokens, but `generation.max_length` counts "
                f"them and is {generation.max_length}; raise it or write max_new_tokens instead."
            )
    if wanted is None:
        return min(DEFAULT_NEW_TOKENS, room)
    if wanted > room:
        raise PromptError(
            f"prompt {index} has {len(token_ids)} tokens and leaves room for {room} in the context, "
            f"but {wanted} new ones are asked for; ask for {room} or fewer."
        )
    return wanted
