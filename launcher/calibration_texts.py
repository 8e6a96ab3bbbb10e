"""The texts that calibrate and those held out, as token ids. Needs no torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from launcher.failures import ConfigError
from launcher.schema import CalibrationSection
from launcher.text import Tokenizer
from launcher.text_file import beginning, has_lone_surrogate, json_lines, read_text

# A text needs a token to predict and one before it.
_LEAST_TOKENS = 2


@dataclass(frozen=True)
class CalibrationTexts:
    """What `prepare` calibrates with.

    Attributes:
        samples, held_out: token ids; no text is in both.
        num_offered: texts in the file, or pieces of a plain text.
        num_cut: drawn texts that were longer than allowed, and lost their end.
        num_passed_over: texts of fewer than two tokens.
    """

    samples: tuple[tuple[int, ...], ...] = ()
    held_out: tuple[tuple[int, ...], ...] = ()
    num_offered: int = 0
    num_cut: int = 0
    num_passed_over: int = 0

    def to_dicts(self) -> Iterator[dict[str, Any]]:
        """One for each line of a file."""
        yield asdict(self)

    @classmethod
    def from_dicts(cls, entries: Sequence[dict[str, Any]]) -> CalibrationTexts:
        """What `to_dicts` gave; no entries are texts that were not read."""
        if not entries:
            return cls()
        (values,) = entries
        for name in ("samples", "held_out"):
            values[name] = tuple(map(tuple, values[name]))
        assert values.keys() == {item.name for item in fields(cls)}, "texts were cut off"
        return cls(**values)


def read_texts(
    section: CalibrationSection, tokenizer: Tokenizer, max_length: int, seed: int, template: str
) -> CalibrationTexts:
    """Draw the texts.

    Args:
        max_length: of a text in tokens.
        template: how BoolQ's passage and question become a text.

    Raises:
        ConfigError: a file that cannot be read, or has no text.
    """
    assert section.data is not None
    wanted = section.num_samples + (section.num_held_out if section.held_out is None else 0)
    drawn = _draw("calibration.data", section.data, section, tokenizer, max_length, seed, template)
    found = drawn.first(wanted)
    if not found.samples:
        raise ConfigError(
            f"`calibration.data` {section.data} has no text of at least {_LEAST_TOKENS} tokens; give "
            "another file."
        )
    samples = found.samples[: section.num_samples]
    held_out = found.samples[section.num_samples :]
    if section.held_out is not None and section.num_held_out:
        other = _draw(
            "calibration.held_out", section.held_out, section, tokenizer, max_length, seed, template
        )
        held_out = other.first(section.num_held_out).samples
        if not held_out:
            raise ConfigError(
                f"`calibration.held_out` {section.held_out} has no text of at least {_LEAST_TOKENS} "
                "tokens; give another file, or leave it out."
            )
    return CalibrationTexts(
        samples, held_out, found.num_offered, found.num_cut, found.num_passed_over
    )


@dataclass(frozen=True)
class _Drawn:
    """A file's texts in a drawn order, tokenized one at a time."""

    token_ids: Iterator[Sequence[int]]
    num_offered: int
    max_length: int

    def first(self, count: int) -> CalibrationTexts:
        """The first so many as samples."""
        samples: list[tuple[int, ...]] = []
        num_cut = num_short = 0
        while len(samples) < count and (ids := next(self.token_ids, None)) is not None:
            if len(ids) < _LEAST_TOKENS:
                num_short += 1
                continue
            num_cut += len(ids) > self.max_length
            samples.append(tuple(ids[: self.max_length]))
        return CalibrationTexts(tuple(samples), (), self.num_offered, num_cut, num_short)


def _draw(
    key: str,
    name: str,
    section: CalibrationSection,
    tokenizer: Tokenizer,
    max_length: int,
    seed: int,
    template: str,
) -> _Drawn:
    text = read_text(key, name)
    if not name.endswith(".jsonl"):
        if section.text_field is not None:
            raise ConfigError(
                f"`calibration.text_field` is for .jsonl files, but `{key}` is {name}; drop it."
            )
        pieces = _shuffled(_pieces(tokenizer.encode(text), max_length), seed)
        return _Drawn(iter(pieces), len(pieces), max_length)
    texts = _shuffled(list(_read_lines(key, name, text, section.text_field, template)), seed)
    return _Drawn(map(tokenizer.encode, texts), len(texts), max_length)


def _shuffled(items: list[Any], seed: int) -> list[Any]:
    random.Random(seed).shuffle(items)
    return items


def _pieces(token_ids: Sequence[int], length: int) -> list[Sequence[int]]:
    """A plain text cut up; a piece has no BOS of its own but the first."""
    return [token_ids[start : start + length] for start in range(0, len(token_ids), length)]


def _read_lines(
    key: str, name: str, text: str, text_field: str | None, template: str
) -> Iterator[str]:
    for number, line, entry in json_lines(text):
        found = _text_of(entry, text_field, template)
        if not isinstance(found, str) or has_lone_surrogate(found):
            wanted = "text, or passage and question" if text_field is None else repr(text_field)
            raise ConfigError(
                f"`{key}` {name}, line {number}: must be a JSON object with {wanted} (text), but is "
                f"{beginning(line)}; mend it, or name the field by calibration.text_field."
            )
        yield found


def _text_of(entry: object, text_field: str | None, template: str) -> object:
    if not isinstance(entry, dict):
        return None
    if text_field is not None or "text" in entry:
        return entry.get("text" if text_field is None else text_field)
    passage, question = entry.get("passage"), entry.get("question")
    if not isinstance(passage, str) or not isinstance(question, str):
        return None
    return template.format(passage=passage, question=question)
