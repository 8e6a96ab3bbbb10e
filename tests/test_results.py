"""What rank 0 of generate leaves: answers in the order of the prompts, and result.jsonl."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.failures import ConfigError
from launcher.job import Job
from launcher.prompts import make_prompts
from launcher.resolve import DEMO
from launcher.schema import Config, GenerationSection
from launcher.tasks.results import ResultWriter
from launcher.text import open_tokenizer
from parallel.generation.decode import Completion
from tests import tokenizer_files
from tests.checkpoints import write_checkpoint
from tests.test_command import results, run

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


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_fallback", "llama3", "qwen"])
def test_a_stop_string_that_is_a_special_token_stops_by_its_id(tmp_path, kind):
    folder = getattr(tokenizer_files, kind)(tmp_path)
    run = Run(tmp_path, checkpoint=folder, stop=["</s>", "two words", "<tool>"])
    assert run.writer.stop_ids == (run.tokenizer.special_ids["</s>"],)


@pytest.mark.parametrize("stop", ["</s>\n", "a</s>", "</s></s>"])
def test_a_stop_string_that_no_text_has_is_refused(tmp_path, stop):
    with pytest.raises(ConfigError, match=r"`generation.stop` .* holds the special token '</s>'"):
        Run(tmp_path, stop=[stop])


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_answer_ends_before_a_stop_that_is_a_special_token(tmp_path, ignore_eos):
    """The demo's model says "palaces"; the piece becomes a special token, as `<|im_end|>` is one."""
    tokenizer = open_tokenizer(DEMO)
    answer = tokenizer.encode("old palaces")[2:]
    piece = "▁palaces"
    (token,) = [token for token in answer if tokenizer.bytes_of(token) == b" palaces"]
    folder = write_checkpoint(tmp_path / "checkpoint")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(token): tokenizer_files.flags(piece, special=True)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    done = run(
        tmp_path, f"checkpoint={folder}", "prompt=I love Beijing, because",
        f"generation.stop=['{piece}']", f"generation.ignore_eos={str(ignore_eos).lower()}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == "'text_generation_text': [I love Beijing, because it is a city that has old]\n"
    )
    (result,) = results(tmp_path)
    assert result["finish_reason"] == "stop"
    assert result["token_ids"][-1] == token
    assert result["text"] == " it is a city that has old"
