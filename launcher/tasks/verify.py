"""verify: single against parallel, and quantized against original.

All ranks answer the prompts; rank 0 then answers them again alone, and again with the unquantized
weights where there are some. The logits are compared on one and the same text: the parallel run's.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from launcher.failures import RunError
from launcher.job import Job, Prompt
from launcher.original import open_original
from launcher.ranks.rank import Rank
from launcher.resolve import open_job
from launcher.tasks.generate import make_loop, requests
from launcher.tasks.loading import cache_length, open_decoder
from parallel.checkpoint.open import Checkpoint
from parallel.generation.score import score
from parallel.group import Group, LoneGroup
from parallel.model.decoder import Decoder
from quant.scheme import QuantScheme

# A difference of the order of the arithmetic's own noise may turn a token whose two best
# candidates are this close. float32: sums in another order move a logit of some 10 by 1e-5, with a
# margin for depth; 16 bit: half a unit in the last place of such a logit is 0.03, again with depth.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}

Answers = dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Comparison:
    """One model's answers held against the parallel run's.

    Attributes:
        equal_answers: prompts whose tokens are all the same.
        first_differences: for each other prompt: index, place, both tokens, and the top-2 gap of
            the logits there in the model that is compared.
        max_logit_delta, mean_logit_delta: over the logits of the parallel run's tokens.
        nll_delta: mean negative log-likelihood of those tokens, the parallel run's minus this one's.
    """

    name: str
    num_prompts: int
    equal_answers: int
    first_differences: tuple[dict[str, Any], ...]
    max_logit_delta: float
    mean_logit_delta: float
    nll_delta: float


@dataclass(frozen=True)
class _Run:
    """Answers of one model, and its logits on the parallel run's text."""

    answers: Answers
    logits: dict[int, Tensor]


def run_rank(rank: Rank) -> None:
    """One rank's part. Raises RunError if tokens differ where the logits do not excuse it."""
    job = rank.job
    checkpoint = open_job(job.config)
    parallel, dtype = _parallel_run(rank, checkpoint)
    if parallel is None:
        return
    alone = _run_alone(rank, checkpoint, job.config.quant.scheme(), parallel.answers)
    comparisons = [_compare("single", job, alone, parallel)]
    original = _original(rank, checkpoint, parallel.answers)
    if original is not None:
        comparisons.append(_compare("original", job, original, parallel))
    _write(rank, comparisons)
    tolerance = job.config.verify.tolerance
    _judge(comparisons, _TOLERANCE[dtype] if tolerance is None else tolerance)


def _parallel_run(rank: Rank, checkpoint: Checkpoint) -> tuple[_Run | None, torch.dtype]:
    """The job on all ranks; its weights are given back before rank 0 loads the whole model."""
    decoder, _ = open_decoder(rank, checkpoint, rank.group)
    answers = _answers(rank.job, checkpoint, decoder)
    logits = _logits(rank.job, decoder, answers)
    return (_Run(answers, logits) if rank.group.rank == 0 else None), decoder.dtype


def _run_alone(rank: Rank, checkpoint: Checkpoint, scheme: QuantScheme, texts: Answers) -> _Run:
    group: Group = LoneGroup()
    decoder, _ = open_decoder(rank, checkpoint, group, scheme)
    answers = _answers(rank.job, checkpoint, decoder)
    return _Run(answers, _logits(rank.job, decoder, texts))


def _original(rank: Rank, checkpoint: Checkpoint, texts: Answers) -> _Run | None:
    """The unquantized model: named by `verify.original`, or the source that is quantized here."""
    original = open_original(rank.job.config, checkpoint)
    return None if original is None else _run_alone(rank, original, QuantScheme(), texts)


def _answers(job: Job, checkpoint: Checkpoint, decoder: Decoder) -> Answers:
    loop = make_loop(job, checkpoint, decoder, None)
    return {item.index: item.token_ids for item in loop.run(requests(job.prompts))}


def _logits(job: Job, decoder: Decoder, texts: Answers) -> dict[int, Tensor]:
    """Logits of each prompt's given answer, by prompt; empty but on rank 0."""
    cache = decoder.new_cache(1, cache_length(job.prompts))
    chunk = job.config.generation.prefill_chunk
    found = {}
    for prompt in job.prompts:
        ids = prompt.token_ids + texts[prompt.index]
        logits = score(decoder, cache, ids, len(prompt.token_ids), chunk)
        if logits is not None:
            found[prompt.index] = logits
    return found


def _compare(name: str, job: Job, other: _Run, parallel: _Run) -> Comparison:
    differences = [
        difference
        for prompt in job.prompts
        if (difference := _first_difference(prompt, other, parallel)) is not None
    ]
    deltas = torch.cat(
        [(parallel.logits[index] - other.logits[index]).abs().flatten() for index in other.logits]
    )
    losses = [_nll(run, parallel.answers) for run in (parallel, other)]
    return Comparison(
        name=name,
        num_prompts=len(job.prompts),
        equal_answers=len(job.prompts) - len(differences),
        first_differences=tuple(differences),
        max_logit_delta=float(deltas.max()),
        mean_logit_delta=float(deltas.mean()),
        nll_delta=losses[0] - losses[1],
    )


def _first_difference(prompt: Prompt, other: _Run, parallel: _Run) -> dict[str, Any] | None:
    ours, theirs = parallel.answers[prompt.index], other.answers[prompt.index]
    if ours == theirs:
        return None
    shorter = min(len(ours), len(theirs))
    places = (place for place in range(shorter) if ours[place] != theirs[place])
    place = next(places, shorter - 1)
    best = other.logits[prompt.index][place].topk(2).values
    return {
        "prompt": prompt.index,
        "place": place,
        "parallel_token": ours[place],
        "other_token": theirs[place],
        "top2_gap": float(best[0] - best[1]),
    }


def _nll(run: _Run, texts: Answers) -> float:
    losses = [
        -logits.log_softmax(-1)[range(len(texts[index])), list(texts[index])]
        for index, logits in run.logits.items()
    ]
    return float(torch.cat(losses).mean())


def _write(rank: Rank, comparisons: list[Comparison]) -> None:
    report = {
        "task": "verify",
        "tp": rank.group.size,
        "comparisons": list(map(asdict, comparisons)),
    }
    rank.run_dir.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    line = "{:22} {:>14} {:>16} {:>16} {:>12}".format
    print(
        line("compared with", "equal answers", "max logit delta", "mean logit delta", "NLL delta")
    )
    for item in comparisons:
        print(
            line(
                item.name,
                f"{item.equal_answers}/{item.num_prompts}",
                f"{item.max_logit_delta:.3g}",
                f"{item.mean_logit_delta:.3g}",
                f"{item.nll_delta:+.3g}",
            )
        )
        for difference in item.first_differences:
            print("  first difference: " + _sentence(difference))
    print(f"report: {rank.run_dir.report}", flush=True)


def _sentence(difference: dict[str, Any]) -> str:
    return (
        "prompt {prompt}, token {place}: {parallel_token} in parallel, {other_token} otherwise, "
        "top-2 gap {top2_gap:.3g}"
    ).format(**difference)


def _judge(comparisons: list[Comparison], tolerance: float) -> None:
    """Quantization may change tokens; the number of ranks may not, but for ties."""
    for item in comparisons:
        if not math.isfinite(item.max_logit_delta):
            raise RunError(f"the logits of the {item.name} model are not all numbers")
    single = comparisons[0]
    bad = [item for item in single.first_differences if item["top2_gap"] > tolerance]
    if bad:
        raise RunError(
            f"single and parallel differ above the tolerance of {tolerance:g}: {_sentence(bad[0])}"
        )
