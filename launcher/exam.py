"""Exam: what `eval` puts before a model, as token ids; equal bytes on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Question:
    """A question of yes or no.

    Attributes:
        index: its place in the file.
        answer: the right one.
        prompt_ids: what both continuations have in common.
        choice_ids: the continuation for yes, then for no.
        num_cut: characters of the passage that were cut off at its end.
        is_merged: the tokenizer joined the end of the prompt with a continuation, so that both
            begin with what they have of the prompt.
    """

    index: int
    text: str
    answer: bool
    prompt_ids: tuple[int, ...]
    choice_ids: tuple[tuple[int, ...], ...]
    num_cut: int
    is_merged: bool

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Question:
        choices = tuple(map(tuple, values["choice_ids"]))
        return cls(**{**values, "prompt_ids": tuple(values["prompt_ids"]), "choice_ids": choices})


@dataclass(frozen=True)
class Exam:
    """A text and questions; either may be missing.

    Attributes:
        text_ids: of the whole text; empty where there is none.
        num_special: how many of them the tokenizer puts before every text, such as BOS.
        num_offered: questions in the file; not all need be asked.
    """

    text_ids: tuple[int, ...] = ()
    num_special: int = 0
    questions: tuple[Question, ...] = ()
    num_offered: int = 0

    def to_dicts(self) -> Iterator[dict[str, Any]]:
        """The text first, then each question."""
        yield {**self.__dict__, "text_ids": list(self.text_ids), "questions": len(self.questions)}
        yield from map(asdict, self.questions)

    @classmethod
    def from_dicts(cls, entries: Sequence[dict[str, Any]]) -> Exam:
        """What `to_dicts` gave; no entries are an exam that was not read."""
        if not entries:
            return cls()
        head, *questions = entries
        text_ids, read = tuple(head["text_ids"]), tuple(map(Question.from_dict, questions))
        assert len(read) == head["questions"], "an exam was cut off"
        return cls(**{**head, "text_ids": text_ids, "questions": read})

    @property
    def token_ids(self) -> Iterator[int]:
        """Every token that the model will see or score."""
        yield from self.text_ids
        for question in self.questions:
            yield from question.prompt_ids
            for choice in question.choice_ids:
                yield from choice
