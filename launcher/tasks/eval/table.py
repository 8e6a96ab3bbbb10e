"""The result of `eval` for people: the protocol in sentences, then one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.exam import Exam
from launcher.schema import EvalSection
from launcher.table import print_table
from launcher.tasks.eval.result import Difference, ModelResult, majority, share, standard_error


def print_result(
    section: EvalSection,
    exam: Exam,
    models: Sequence[ModelResult],
    changes: Sequence[Difference | None],
) -> None:
    """`changes` has one entry for each model: None for the first."""
    for sentence in protocol_sentences(section, exam, models[0]):
        print(sentence)
    print()
    columns = [("model", *(model.name for model in models))]
    columns.append(("computed in", *(model.dtype for model in models)))
    if exam.text_ids:
        columns += _perplexity_columns(models, changes)
    if exam.questions:
        columns += _question_columns(exam, models, changes)
    print_table(list(zip(*columns, strict=True)))


def protocol_sentences(section: EvalSection, exam: Exam, model: ModelResult) -> list[str]:
    """How it was measured."""
    found = []
    if model.loss is not None:
        found.append(
            f"perplexity of {section.text}: windows of {section.window} tokens every "
            f"{section.stride}, tokens already scored are context only; {model.loss.num_tokens:,} of "
            f"{len(exam.text_ids):,} tokens scored; {special_words(exam)}"
        )
    if exam.questions:
        answer, part = majority(exam.questions)
        found.append(
            f"yes or no of {section.questions}: {len(exam.questions):,} of {exam.num_offered:,} "
            f"questions, {num_cut(exam):,} passages cut at their end to fit the context; "
            f"{'yes' if answer else 'no'} is right for {part:.1%}"
        )
        words = " or ".join(map(repr, section.choices))
        found.append(
            f"prompt {section.template!r}, then {words}: the larger summed log-probability"
        )
    return found


def special_words(exam: Exam) -> str:
    """What the tokenizer put before the text, such as BOS."""
    if not exam.num_special:
        return "no BOS: the tokenizer adds none"
    ids = ", ".join(map(str, exam.text_ids[: exam.num_special]))
    return f"BOS (token {ids}) once, before the text, never scored"


def num_cut(exam: Exam) -> int:
    return sum(question.num_cut > 0 for question in exam.questions)


def _perplexity_columns(
    models: Sequence[ModelResult], changes: Sequence[Difference | None]
) -> list[tuple[str, ...]]:
    losses = [model.loss for model in models if model.loss is not None]
    found = [
        ("mean NLL", *(f"{loss.mean_nll:.5f}" for loss in losses)),
        ("perplexity", *(f"{loss.perplexity:.5g}" for loss in losses)),
    ]
    if any(changes):
        found.append(("change", *_cells(changes, "perplexity_increase", "+.3f", " %")))
    return found


def _question_columns(
    exam: Exam, models: Sequence[ModelResult], changes: Sequence[Difference | None]
) -> list[tuple[str, ...]]:
    marks = [model.marks(exam.questions) for model in models]
    found = [
        ("accuracy", *(f"{share(mark):.1%} ± {standard_error(mark):.1%}" for mark in marks)),
        ("says yes", *(f"{share(model.answers):.1%}" for model in models)),
    ]
    if any(changes):
        found.append(("change", *_cells(changes, "accuracy_points", "+.1f", " points")))
        found.append(("flipped", *_cells(changes, "num_flipped", ",", "")))
    return found


def _cells(
    changes: Sequence[Difference | None], name: str, form: str, unit: str
) -> tuple[str, ...]:
    values: list[Any] = [change and getattr(change, name) for change in changes]
    return tuple("" if value is None else f"{value:{form}}{unit}" for value in values)
