"""eval: perplexity on a text and accuracy on questions of yes or no, original beside quantized.

All ranks run each model in turn; the weights of one are given back before the next is loaded. Rank 0
has the logits, prints one table, and writes report.json and result.jsonl.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from launcher.job import Job
from launcher.original import open_original
from launcher.progress import open_bar
from launcher.ranks.rank import Rank
from launcher.resolve import open_job
from launcher.tasks.eval.report import write_result
from launcher.tasks.eval.result import ModelResult
from launcher.tasks.loading import open_decoder
from parallel.checkpoint.open import Checkpoint
from parallel.generation.choices import Problem, choice_log_probs
from parallel.generation.loss import Loss
from parallel.generation.perplexity import cut_windows, window_loss
from parallel.model.decoder import Decoder
from quant.scheme import QuantScheme


@dataclass(frozen=True)
class _Model:
    """What is to be measured."""

    name: str
    checkpoint: Checkpoint
    scheme: QuantScheme


def run_rank(rank: Rank) -> None:
    """One rank's part; rank 0 prints and writes the result."""
    results = [_measure(rank, model) for model in _models(rank.job)]
    if rank.group.rank == 0:
        write_result(rank, results)


def _models(job: Job) -> list[_Model]:
    """The original where there is one, then the job's own."""
    config = job.config
    checkpoint = open_job(config)
    scheme = config.quant.scheme()
    original = open_original(config, checkpoint)
    is_quantized = scheme != QuantScheme()
    own = _Model(scheme.label if is_quantized else "original", checkpoint, scheme)
    if original is None:
        return [own]
    return [_Model("original", original, QuantScheme()), own]


def _measure(rank: Rank, model: _Model) -> ModelResult:
    """One model's result; empty but on rank 0."""
    problems = [Problem(item.prompt_ids, item.choice_ids) for item in rank.job.exam.questions]
    longest = max([_window(rank.job), *(problem.length for problem in problems)])
    decoder, _ = open_decoder(rank, model.checkpoint, rank.group, model.scheme, max_length=longest)
    seconds: dict[str, float] = {}
    with _timed(seconds, "text"):
        loss = _text_loss(rank, decoder, model.name)
    with _timed(seconds, "questions"):
        found = _choose(rank, decoder, problems, model.name)
    return ModelResult(
        name=model.name,
        checkpoint=str(model.checkpoint.path),
        scheme=model.scheme.label,
        dtype=str(decoder.dtype).removeprefix("torch."),
        loss=loss,
        choice_log_probs=found,
        seconds=seconds,
    )


def _window(job: Job) -> int:
    """Tokens of the longest window; 0 where there is no text."""
    assert job.config.eval.window is not None
    return min(job.config.eval.window, len(job.exam.text_ids))


def _text_loss(rank: Rank, decoder: Decoder, name: str) -> Loss | None:
    """The loss on the text, of no tokens but on rank 0; None where there is no text."""
    ids, config = rank.job.exam.text_ids, rank.job.config
    if not ids:
        return None
    assert config.eval.window is not None
    assert config.eval.stride is not None
    cache = decoder.new_cache(1, _window(rank.job))
    windows = list(cut_windows(len(ids), config.eval.window, config.eval.stride))
    chunk, losses = config.generation.prefill_chunk, []
    with _bar(rank, len(windows), "window", f"{name}: text") as bar:
        for window in windows:
            losses.append(window_loss(decoder, cache, ids, window, chunk))
            bar.update()
    return Loss.total(losses)


def _choose(
    rank: Rank, decoder: Decoder, problems: Sequence[Problem], name: str
) -> tuple[tuple[float, ...], ...]:
    """Log-probabilities of yes and no for each question; empty but on rank 0."""
    if not problems:
        return ()
    section = rank.job.config.generation
    size = min(section.max_num_seqs, len(problems))
    cache = decoder.new_cache(size, max(problem.length for problem in problems))
    found: list[tuple[float, ...]] = []
    with _bar(rank, len(problems), "question", f"{name}: questions") as bar:
        for start in range(0, len(problems), size):
            batch = problems[start : start + size]
            sums = choice_log_probs(decoder, cache, batch, section.prefill_chunk)
            found += [] if sums is None else map(tuple, sums.tolist())
            bar.update(len(batch))
    return tuple(found)


def _bar(rank: Rank, total: int, unit: str, name: str) -> tqdm[Any]:
    is_shown = rank.group.rank == 0
    return open_bar(rank.console, is_shown=is_shown, total=total, unit=unit, desc=name, leave=False)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
