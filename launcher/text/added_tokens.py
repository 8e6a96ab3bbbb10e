"""Tokens that stand for themselves in a text: those of the model's own vocabulary, and added ones.

The files beside `tokenizer.model` name them as transformers writes them: `added_tokens_decoder` of
tokenizer_config.json, or before there was that, added_tokens.json and special_tokens_map.json.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from parallel.checkpoint.json_file import read_json_object
from parallel.errors import CheckpointError

_NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class AddedToken:
    """One token, found in a text before anything else is.

    Attributes:
        special: it leaves no trace in decoded text.
        lstrip, rstrip: it takes the white space before or after it.
        single_word: it is not found inside a word.
        normalized: it is looked for after those that are not.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class Pieces(Protocol):
    """The vocabulary of the model itself."""

    def __len__(self) -> int: ...

    def text_of(self, token: int) -> str | None: ...

    def id_of(self, text: str) -> int | None: ...


class AddedTokens:
    """The added tokens, and where they are in a text.

    Attributes:
        roles: ids of those that have one, such as `bos_token`.
    """

    def __init__(self, by_id: Mapping[int, AddedToken], roles: Mapping[str, int]) -> None:
        self.by_id = by_id
        self.roles = roles
        self._contents = [token.content for token in by_id.values()]

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(id, start, stop) of each, in order."""
        if not any(content in text for content in self._contents):
            return  # without importing the library: most prompts have none
        encoding = self._finder.encode(text)
        ids = list(self.by_id)
        for place, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            yield ids[place], start, stop

    @cached_property
    def _finder(self) -> Any:
        """A tokenizer that knows these tokens alone, numbered from 0."""
        import tokenizers

        finder = tokenizers.Tokenizer(tokenizers.models.BPE())
        finder.add_tokens([tokenizers.AddedToken(**vars(token)) for token in self.by_id.values()])
        return finder


def read_added_tokens(
    directory: Path, config: Mapping[str, Any], pieces: Pieces, own: Mapping[int, AddedToken]
) -> AddedTokens:
    """The tokens that the files in `directory` name, and the model's own.

    Args:
        config: tokenizer_config.json.
        own: those of the model itself, such as `<s>`.

    Raises:
        CheckpointError: a file is not what it should be, or gives an id that another token has.
    """
    config_path = directory / "tokenizer_config.json"
    named = dict(_named_tokens(config_path, config))
    if config.get("added_tokens_decoder") is not None:
        listed = _listed(config_path, _decoder_entries(config_path, config), pieces)
    else:
        map_path, path = directory / "special_tokens_map.json", directory / "added_tokens.json"
        named |= _named_tokens(map_path, _read(map_path))
        special = {token.content for token in named.values()}
        listed = _listed(path, _added_entries(path, special), pieces)
    found = {**own, **listed}
    for number in own.keys() & listed.keys():
        is_special = listed[number].special or own[number].special
        found[number] = replace(listed[number], special=is_special)
    ids = {token.content: number for number, token in found.items()}
    for token in named.values():
        known = ids.get(token.content, pieces.id_of(token.content))
        # A name without an id gets the next one, as in transformers.
        number = max(len(pieces) - 1, *found) + 1 if known is None else known
        ids[token.content] = number
        found[number] = replace(found.get(number, token), special=True)
    return AddedTokens(found, {role: ids[token.content] for role, token in named.items()})


def _named_tokens(path: Path, values: Mapping[str, Any]) -> Iterator[tuple[str, AddedToken]]:
    """(role, token) of the special tokens that a file names by what they are for."""
    entries = {key: values[key] for key in _NAMED if values.get(key) is not None}
    for key in _LISTED:
        listed = values.get(key) or []
        if isinstance(listed, dict):
            listed = list(listed.values())
        if not isinstance(listed, list):
            raise _error(path, key, "a list of tokens", listed)
        entries |= {f"{key}.{place}": entry for place, entry in enumerate(listed)}
    for role, entry in entries.items():
        token = _token(path, role, {"content": entry} if isinstance(entry, str) else entry)
        yield role, replace(token, special=True)


def _decoder_entries(path: Path, config: Mapping[str, Any]) -> Iterator[tuple[Any, AddedToken]]:
    entries = config["added_tokens_decoder"]
    if not isinstance(entries, dict):
        raise _error(path, "added_tokens_decoder", "an object of tokens", entries)
    for key, entry in entries.items():
        number = int(key) if re.fullmatch("[0-9]{1,10}", key) else key
        yield number, _token(path, f"added_tokens_decoder.{key}", entry)


def _added_entries(path: Path, special: Container[str]) -> Iterator[tuple[Any, AddedToken]]:
    for content, number in _read(path).items():
        is_special = content in special
        token = _token(path, "a token", {"content": content})
        yield number, replace(token, special=is_special, normalized=not is_special)


def _listed(
    path: Path, entries: Iterable[tuple[Any, AddedToken]], pieces: Pieces
) -> dict[int, AddedToken]:
    """Tokens by their ids, which must be the model's where it has them, and else beyond its own."""
    found: dict[int, AddedToken] = {}
    ids: dict[str, int] = {}
    for number, token in entries:
        content = token.content
        if type(number) is not int or not 0 <= number < 1 << 31:
            raise _error(path, f"the id of {content!r}", "a whole number from 0", number)
        known = ids.get(content, pieces.id_of(content))
        holder = found[number].content if number in found else pieces.text_of(number)
        if known not in (None, number) or holder not in (None, content):
            clash = f"{content!r} is {known}" if known is not None else f"that is {holder!r}"
            raise CheckpointError(
                f"{path} gives {content!r} the id {number}, but {clash}; copy this file and the "
                "tokenizer from one and the same model."
            )
        found[number], ids[content] = token, number
    return found


def _token(path: Path, key: str, entry: Any) -> AddedToken:
    if not isinstance(entry, dict):
        raise _error(path, key, "a token's text or an object", entry)
    content = entry.get("content")
    if not isinstance(content, str) or not content:
        raise _error(path, f"{key}.content", "a text", content)
    flags = {name: entry[name] for name in _FLAGS if name in entry}
    for name, value in flags.items():
        if type(value) is not bool:
            raise _error(path, f"{key}.{name}", "true or false", value)
    return AddedToken(content, **flags)


def _error(path: Path, name: str, rule: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name} must be {rule}, but is {reprlib.repr(value)}; correct it."
    )


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}
