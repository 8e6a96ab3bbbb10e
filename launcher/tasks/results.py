"""What rank 0 of generate leaves: text on stdout, result.jsonl, and a progress bar on the console."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from launcher.job import Prompt
from launcher.progress import open_bar
from launcher.ranks.rank import Rank
from launcher.text import TextStream, open_tokenizer
from parallel.generation.decode import Completion


class ResultWriter:
    """Takes tokens and completions in any order of the prompts.

    Attributes:
        stop_ids: tokens that end an answer because they are stop strings: no text has special tokens.
    """

    def __init__(self, rank: Rank) -> None:
        job = rank.job
        tokenizer, stop = open_tokenizer(job.checkpoint), job.config.generation.stop
        self.stop_ids = tuple(
            tokenizer.special_ids[word] for word in stop if word in tokenizer.special_ids
        )
        self._prompts = {item.index: item for item in job.prompts}
        self._stream = cache(
            lambda index: TextStream(tokenizer, self._prompts[index].token_ids, stop)
        )
        self._file = _ResultFile(rank.run_dir.result)
        self._bar = open_bar(
            rank.console,
            # On a terminal the text itself shows progress, and a bar would be drawn into its line.
            is_shown=len(job.prompts) > 1 and not sys.stdout.isatty(),
            total=sum(item.max_new_tokens for item in job.prompts),
            unit="token",
        )
        self._printed = _InOrder(job.prompts, self._stream)

    def take(self, index: int, token: int) -> bool:
        """A new token; True once a stop string is met."""
        new, is_stopped = self._stream(index).add(token)
        self._printed.grow(index, new)
        self._bar.update()
        return is_stopped

    def finish(self, completion: Completion) -> None:
        """A prompt has ended: write its result."""
        prompt, stream = self._prompts[completion.index], self._stream(completion.index)
        self._printed.grow(prompt.index, stream.finish())
        self._printed.end(prompt.index)
        self._file.write(prompt, completion, stream.text)

    def close(self) -> None:
        """All prompts have ended."""
        self._bar.close()
        self._file.sort()


class _InOrder:
    """Answers on stdout, in the order of the prompts.

    The first one that has not ended grows there as its tokens come. Those after it are held back
    until it is their turn.
    """

    def __init__(self, prompts: Sequence[Prompt], stream: Callable[[int], TextStream]) -> None:
        self._waiting = deque(prompts)
        self._stream = stream
        self._ended: set[int] = set()
        self._begin()

    def grow(self, index: int, new: str) -> None:
        if self._waiting[0].index == index:
            _print(new)

    def end(self, index: int) -> None:
        self._ended.add(index)
        while self._waiting and self._waiting[0].index in self._ended:
            _print("]\n")
            self._waiting.popleft()
            self._begin()

    def _begin(self) -> None:
        """The next prompt, with what there is of its answer."""
        if self._waiting:
            prompt = self._waiting[0]
            _print(f"'text_generation_text': [{prompt.text}{self._stream(prompt.index).text}")


class _ResultFile:
    """result.jsonl: a line for each answer as it ends, and in the order of the prompts at last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()
        self._lines: list[tuple[int, str]] = []

    def write(self, prompt: Prompt, completion: Completion, text: str) -> None:
        entry = {
            "index": prompt.index,
            "id": prompt.id,
            "prompt": prompt.text,
            "text": text,
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        self._lines.append((prompt.index, line))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)

    def sort(self) -> None:
        """A reader sees the file as it was or as it will be, whatever happens."""
        ordered = sorted(self._lines)
        if ordered == self._lines:
            return
        beside = self._path.with_name(f"{self._path.name}.sorted")
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(line for _, line in ordered)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)


def _print(text: str) -> None:
    """To stdout at once, also into a pipe; a reader that has gone does not end the run."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = Path("/dev/null").open("w")  # noqa: SIM115
