"""What rank 0 of generate leaves: answers in the order of the prompts, and result.jsonl."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.job import Job
from launcher.prompts import make_prompts
from launcher.resolve import DEMO
from launcher.schema import Config, GenerationSection
from launcher.tasks.results import ResultWriter
from launcher.text import open_tokenizer
from parallel.generation.decode import Completion

TEXTS = ["I love", "LLaMA is", "Huawei"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Run:
    """A run of three prompts, whose tokens and ends a test gives in any order."""

    def __init__(self, folder: Path, console=None, checkpoint: Path = DEMO, stop=()) -> None:
        self.tokenizer = open_tokenizer(checkpoint)
        config = Config(
            checkpoint=str(checkpoint),
            prompts=TEXTS,
            generation=GenerationSection(stop=list(stop), max_new_tokens=9),
        )
        self.prompts = make_prompts(config, self.tokenizer, 128, None)
        self.path = folder / "result.jsonl"
        self.writer = ResultWriter(
            SimpleNamespace(
                job=Job(config, self.prompts),
                run_dir=SimpleNamespace(result=self.path),
                console=console or io.StringIO(),
            )
        )

    def say(self, index: int, text: str) -> None:
        prompt = TEXTS[index]
        before, after = self.tokenizer.encode(prompt), self.tokenizer.encode(prompt + text)
        for token in after[len(before) :]:
            self.writer.take(index, token)

    def end(self, index: int) -> None:
        self.writer.finish(Completion(index, (5, 6), "length"))

    def order(self) -> list[int]:
        return [json.loads(line)["index"] for line in self.path.read_text().splitlines()]


def test_answers_are_printed_in_the_order_of_the_prompts_and_the_first_one_grows(tmp_path, capsys):
    run = Run(tmp_path)

    def printed() -> str:
        return capsys.readouterr().out

    assert printed() == "'text_generation_text': [I love"
    run.say(0, " the city")
    assert printed() == " the city"
    run.say(1, " a model")
    run.say(2, " makes")
    run.end(2)
    assert printed() == ""
    run.end(0)
    assert printed() == "]\n'text_generation_text': [LLaMA is a model"
    run.say(1, " of words")
    assert printed() == " of words"
    run.end(1)
    assert printed() == "]\n'text_generation_text': [Huawei makes]\n"


def test_what_was_held_back_is_printed_once_the_answer_ends(tmp_path, capsys):
    run = Run(tmp_path, stop=["city of"])
    run.say(0, " the city")
    assert capsys.readouterr().out.endswith("[I love the ")
    run.end(0)
    assert capsys.readouterr().out.startswith("city]\n")


def test_results_are_written_as_they_end_and_sorted_at_last(tmp_path):
    run = Run(tmp_path)
    for index in (2, 0, 1):
        run.end(index)
        assert run.order()[-1] == index
    assert run.order() == [2, 0, 1]
    run.writer.close()
    assert run.order() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["result.jsonl"]


def test_sorting_that_fails_leaves_the_results_as_they_ended(tmp_path, monkeypatch):
    run = Run(tmp_path)
    for index in (2, 0, 1):
        run.end(index)

    def full(_fd):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.writer.close()
    assert run.order() == [2, 0, 1]


def test_a_reader_of_the_results_never_sees_a_half_sorted_file(tmp_path):
    run = Run(tmp_path)
    for index in (2, 0, 1):
        run.end(index)
    with run.path.open() as reader:
        first = reader.readline()
        run.writer.close()
        lines = [first, *reader]
    assert [json.loads(line)["index"] for line in lines] == [2, 0, 1]


@pytest.mark.parametrize("text_is_shown", [True, False])
def test_no_bar_is_drawn_into_the_line_that_grows(tmp_path, monkeypatch, text_is_shown):
    monkeypatch.setattr(sys, "stdout", Terminal() if text_is_shown else io.StringIO())
    console = Terminal()
    run = Run(tmp_path, console)
    run.say(0, " the city")
    run.writer.close()
    assert ("token" in console.getvalue()) is not text_is_shown
