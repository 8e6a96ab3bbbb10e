"""Job: what every rank must agree on, resolved and checked before anything starts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.calibration_texts import CalibrationTexts
from launcher.exam import Exam
from launcher.failures import ConfigError
from launcher.schema import Config, from_yaml, to_yaml


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        index: its place among all prompts.
        id: the name that a .jsonl file gave it, or None.
        token_ids: what the model is given.
        max_new_tokens: how long its answer may be.
    """

    index: int
    id: str | int | None
    text: str
    token_ids: tuple[int, ...]
    max_new_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "token_ids": list(self.token_ids)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Prompt:
        return cls(**{**values, "token_ids": tuple(values["token_ids"])})


@dataclass(frozen=True)
class Job:
    """A resolved configuration and what it works on: prompts, what eval asks, texts to calibrate with.

    Equal bytes on every rank.
    """

    config: Config
    prompts: tuple[Prompt, ...]
    exam: Exam = Exam()
    texts: CalibrationTexts = CalibrationTexts()

    @property
    def checkpoint(self) -> Path:
        assert self.config.checkpoint is not None
        return Path(self.config.checkpoint)

    @property
    def tokenizer(self) -> Path:
        """The directory or file of the tokenizer."""
        return tokenizer_path(self.config) or self.checkpoint

    @property
    def tp(self) -> int:
        assert self.config.parallel.tp is not None
        return self.config.parallel.tp

    def config_text(self) -> str:
        return to_yaml(self.config)

    def prompts_text(self) -> str:
        entries: Iterable[dict[str, Any]] = (prompt.to_dict() for prompt in self.prompts)
        if self.config.task.name == "eval":
            entries = self.exam.to_dicts()
        elif self.config.task.name == "prepare":
            entries = self.texts.to_dicts()
        return "".join(json.dumps(entry) + "\n" for entry in entries)

    @classmethod
    def from_texts(cls, config_text: str, prompts_text: str) -> Job:
        config = from_yaml(config_text)
        entries = list(map(json.loads, prompts_text.splitlines()))
        if config.task.name == "eval":
            return cls(config, (), Exam.from_dicts(entries))
        if config.task.name == "prepare":
            return cls(config, (), texts=CalibrationTexts.from_dicts(entries))
        return cls(config, tuple(map(Prompt.from_dict, entries)))


def tokenizer_path(config: Config) -> Path | None:
    """The tokenizer that is given; None: the one beside the weights is meant."""
    return None if config.tokenizer is None else Path(config.tokenizer).absolute()


def first_difference(mine: Config, other: Config) -> str | None:
    """`key is A here and B on rank 0`, or None where both are equal."""
    for section, value in mine.__dict__.items():
        theirs = getattr(other, section)
        if value == theirs or (section == "kernel" and value == "auto"):
            continue  # rank 0 chooses the kernel
        if not hasattr(value, "__dict__"):
            return f"{section} is {value!r} here and {theirs!r} on rank 0"
        for key, inner in value.__dict__.items():
            if inner != getattr(theirs, key):
                return f"{section}.{key} is {inner!r} here and {getattr(theirs, key)!r} on rank 0"
    return None


def with_tp(config: Config, tp: int) -> Config:
    """The configuration with its number of ranks filled in."""
    if config.parallel.dp != 1:
        raise ConfigError(
            f"`parallel.dp` must be 1, but is {config.parallel.dp}; start one run for each replica."
        )
    return replace(config, parallel=replace(config.parallel, tp=tp))
