"""What `eval` found of a model, and what follows from it. Needs no torch.

A model that answers by chance, or always alike, is seen by three figures beside its accuracy: the
share of the more frequent right answer, the share of its own yes, and the standard error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.exam import Question
from parallel.generation.loss import Loss


@dataclass(frozen=True)
class ModelResult:
    """One model's result on an exam.

    Attributes:
        checkpoint: where its weights are.
        scheme: of their quantization, or `none`.
        loss: on the text; None where there is none.
        choice_log_probs: summed log-probabilities of yes and of no, for each question.
        seconds: of the text and of the questions.
    """

    name: str
    checkpoint: str
    scheme: str
    dtype: str
    loss: Loss | None
    choice_log_probs: tuple[tuple[float, ...], ...]
    seconds: dict[str, float]

    @property
    def answers(self) -> list[bool]:
        """Yes where it is likelier than no."""
        return [yes > no for yes, no in self.choice_log_probs]

    def marks(self, questions: Sequence[Question]) -> list[bool]:
        """Whether each answer is right."""
        pairs = zip(self.answers, questions, strict=True)
        return [answer == question.answer for answer, question in pairs]

    def to_dict(self, questions: Sequence[Question]) -> dict[str, Any]:
        values = {
            key: getattr(self, key) for key in ("name", "checkpoint", "scheme", "dtype", "seconds")
        }
        if self.loss is not None:
            values["perplexity"] = {
                "perplexity": self.loss.perplexity,
                "mean_nll": self.loss.mean_nll,
                "num_tokens": self.loss.num_tokens,
            }
        if questions:
            marks = self.marks(questions)
            values["questions"] = {
                "accuracy": share(marks),
                "standard_error": standard_error(marks),
                "num_right": sum(marks),
                "share_of_yes": share(self.answers),
                "num_ties": sum(yes == no for yes, no in self.choice_log_probs),
            }
        return values


@dataclass(frozen=True)
class Difference:
    """What quantization did; None where that part was not measured.

    Attributes:
        perplexity_increase: of the original's, in percent.
        accuracy_points: quantized minus original, in percentage points.
        num_flipped: answers that differ; `num_lost` of them were right before.
    """

    perplexity_increase: float | None
    accuracy_points: float | None
    num_flipped: int | None
    num_lost: int | None


def difference(
    original: ModelResult, quantized: ModelResult, questions: Sequence[Question]
) -> Difference:
    """The quantized model's result against the original's."""
    increase = points = num_flipped = num_lost = None
    if original.loss is not None and quantized.loss is not None:
        # The ratio of two perplexities, without the rounding of either.
        increase = 100 * math.expm1(min(700, quantized.loss.mean_nll - original.loss.mean_nll))
    if questions:
        before, after = original.marks(questions), quantized.marks(questions)
        points = 100 * (share(after) - share(before))
        num_flipped = sum(a != b for a, b in zip(before, after, strict=True))
        num_lost = sum(a and not b for a, b in zip(before, after, strict=True))
    return Difference(increase, points, num_flipped, num_lost)


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def standard_error(flags: Sequence[bool]) -> float:
    """Of a share, if the questions are taken for independent draws."""
    return math.sqrt(share(flags) * (1 - share(flags)) / len(flags))


def majority(questions: Sequence[Question]) -> tuple[bool, float]:
    """The more frequent right answer and its share: what always saying it would score."""
    yes = share([question.answer for question in questions])
    return yes >= 0.5, max(yes, 1 - yes)
