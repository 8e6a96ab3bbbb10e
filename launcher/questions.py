"""Questions of yes or no from a file in BoolQ's form, as token ids that fit the context.

A line is a JSON object with `question`, `passage` and `answer` (Clark et al., BoolQ, 2019); further
fields, such as `title`, are the user's own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from launcher.exam import Question
from launcher.failures import ConfigError
from launcher.text import Tokenizer, num_shared
from launcher.text_file import beginning, has_lone_surrogate, json_lines, read_text
from parallel.errors import PromptError

# lm-evaluation-harness's for BoolQ; the demo model knows one form alone.
TEMPLATE = "{passage}\nQuestion: {question}?\nAnswer:"
DEMO_TEMPLATE = "Passage: {passage} Question: {question}? Answer:"
_FIELDS = ("passage", "question")
_KINDS: tuple[tuple[str, type, str], ...] = (
    ("question", str, "a string"),
    ("passage", str, "a string"),
    ("answer", bool, "true or false"),
)


@dataclass(frozen=True)
class Item:
    """One line of the file. `passage` is empty where the template has no place for it."""

    line: int
    question: str
    passage: str
    answer: bool


@dataclass(frozen=True)
class Form:
    """How a question is put.

    Attributes:
        template: of the prompt, with {question} and perhaps {passage}.
        choices: the continuations for yes and for no.
        context: most tokens of a prompt and a continuation.
    """

    template: str
    choices: tuple[str, ...]
    tokenizer: Tokenizer
    context: int

    def prompt(self, item: Item, length: int) -> str:
        """The text before the continuation, with so many characters of the passage."""
        return self.template.format(question=item.question, passage=item.passage[:length])

    def wholes(self, item: Item, length: int) -> list[list[int]]:
        """Token ids of prompt and continuation together, for each continuation."""
        prompt = self.prompt(item, length)
        return [self.tokenizer.encode(prompt + choice) for choice in self.choices]

    def fits(self, item: Item, length: int) -> bool:
        return max(map(len, self.wholes(item, length))) <= self.context


def check_template(template: str) -> None:
    """Raises ConfigError for braces that do not close, an unknown field, or no {question}."""
    try:
        parts = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ConfigError(
            f"`eval.template` {template!r} has a brace alone ({error}); write {{{{ or }}}} for a brace."
        ) from error
    for name, *how in parts:
        if name not in _FIELDS or any(how):
            raise ConfigError(
                f"`eval.template` must have the fields {{passage}} and {{question}} only, but has "
                f"{{{name}}} in {template!r}; drop it."
                if not any(how)
                else f"`eval.template` must have plain fields, but {{{name}}} in {template!r} has a "
                "conversion or format; drop that."
            )
    if "question" not in [name for name, *_ in parts]:
        raise ConfigError(
            f"`eval.template` must have the field {{question}}, but is {template!r}; add it."
        )


def read_items(name: str, template: str) -> list[Item]:
    """Every line of the file.

    Raises:
        ConfigError: it cannot be read, has no line, or one that is not of the form (by its number).
    """
    text = read_text("eval.questions", name)
    items = [_item(name, template, *line) for line in json_lines(text)]
    if not items:
        raise ConfigError(
            f"`eval.questions` {name} holds no question; write one JSON object a line."
        )
    return items


def _item(name: str, template: str, number: int, line: str, entry: Any) -> Item:
    place = f"`eval.questions` {name}, line {number}"
    if not isinstance(entry, dict):
        raise ConfigError(
            f"{place}, must be a JSON object with question, passage and answer, but is "
            f"{beginning(line)}; correct it."
        )
    wants_passage = "{passage}" in template
    for key, kind, words in _KINDS:
        if (key != "passage" or wants_passage) and not isinstance(entry.get(key), kind):
            found = beginning(str(entry[key])) if key in entry else "missing"
            raise ConfigError(f"{place}: `{key}` must be {words}, but is {found}; correct it.")
        if isinstance(entry.get(key), str) and has_lone_surrogate(entry[key]):
            raise ConfigError(
                f"{place}: `{key}` has a lone surrogate, {beginning(entry[key])}; write the "
                "character itself."
            )
    passage = entry["passage"] if wants_passage else ""
    return Item(number, entry["question"], passage, entry["answer"])


def make_questions(items: Sequence[Item], form: Form) -> Iterator[Question]:
    """Each item as token ids; a passage that does not fit the context is cut at its end.

    Raises:
        PromptError: a question does not fit without any passage, or a continuation adds no token.
    """
    for index, item in enumerate(items):
        length = _passage_length(item, form)
        wholes = form.wholes(item, length)
        prompt_ids = form.tokenizer.encode(form.prompt(item, length))
        shared = num_shared(prompt_ids, *wholes)
        yield Question(
            index=index,
            text=item.question,
            answer=item.answer,
            prompt_ids=tuple(prompt_ids[:shared]),
            choice_ids=_choices(item, form, wholes, shared),
            num_cut=len(item.passage) - length,
            is_merged=shared < len(prompt_ids),
        )


def _choices(
    item: Item, form: Form, wholes: Sequence[list[int]], shared: int
) -> tuple[tuple[int, ...], ...]:
    """What each continuation has beyond the tokens that all share with the prompt alone.

    A tokenizer may join the prompt's last characters with the continuation's first. Then the shared
    tokens end before them, and each continuation is scored with its own joint token: the sums are
    of the same characters all the same.
    """
    found = tuple(tuple(whole[shared:]) for whole in wholes)
    if shared == 0:
        raise PromptError(
            f"`eval.template` leaves no token before the answer of line {item.line}; begin it with "
            "some text."
        )
    if () in found or found[0] == found[1]:
        raise PromptError(
            f"`eval.choices` must be different tokens after the prompt, but the tokenizer gives "
            f"{list(form.choices)} the ids {list(map(list, found))}; choose other words."
        )
    return found


def _passage_length(item: Item, form: Form) -> int:
    """The longest beginning of the passage, in characters, that fits the context."""
    whole = len(item.passage)
    if form.fits(item, whole):
        return whole
    length = bisect_right(range(whole), 0, key=lambda size: int(not form.fits(item, size))) - 1
    # More characters may be fewer tokens, so what the search says may be one too many.
    while length >= 0 and not form.fits(item, length):
        length -= 1
    if length < 0:
        tokens = max(map(len, form.wholes(item, 0)))
        raise PromptError(
            f"the question in line {item.line} has {tokens} tokens with its answer and without its "
            f"passage, but the context is {form.context}; leave it out, or shorten `eval.template`."
        )
    return length
