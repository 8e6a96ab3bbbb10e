"""generate: prompts -> text, on one rank or several."""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from launcher.job import Job, Prompt
from launcher.ranks.rank import Rank
from launcher.resolve import model_overrides
from launcher.schema import GenerationSection
from launcher.tasks.loading import cache_length, open_decoder, say_loaded
from launcher.tasks.results import ResultWriter
from parallel.checkpoint.open import Checkpoint, open_checkpoint
from parallel.generation.decode import GenerationLoop, Request, Timings
from parallel.generation.sampling import Sampling
from parallel.load import LoadTimings
from parallel.model.decoder import Decoder


def run_rank(rank: Rank) -> None:
    """One rank's part: load its weights, run the loop; rank 0 prints and writes the results."""
    checkpoint = open_checkpoint(rank.job.checkpoint, model_overrides(rank.job.config))
    rank.timeline.mark("open_checkpoint")
    decoder, loaded = open_decoder(rank, checkpoint, rank.group)
    rank.timeline.mark("load")
    if rank.group.rank == 0:
        _say_dtype(rank, checkpoint, decoder)
    say_loaded(rank, loaded)
    rank.group.barrier()
    rank.timeline.mark("wait_for_others")
    writer = ResultWriter(rank) if rank.group.rank == 0 else None
    loop = make_loop(rank.job, checkpoint, decoder, writer)
    rank.timeline.mark("tokenizer_and_cache")
    for completion in loop.run(requests(rank.job.prompts)):
        if writer:
            writer.finish(completion)
    if writer:
        writer.close()
    rank.timeline.mark("prefill", loop.timings.first_token_at)
    _report(rank, loop.timings, loaded)


def _say_dtype(rank: Rank, checkpoint: Checkpoint, decoder: Decoder) -> None:
    chosen = str(decoder.dtype).removeprefix("torch.")
    if rank.job.config.dtype == "auto" and chosen != checkpoint.config.dtype:
        print(
            f"shardrun: this processor does not multiply {checkpoint.config.dtype}: computing in "
            f"{chosen} (dtype=… for another)",
            file=rank.console,
        )


def make_loop(
    job: Job, checkpoint: Checkpoint, decoder: Decoder, writer: ResultWriter | None
) -> GenerationLoop:
    """The generation loop of a job, with a cache as long as its longest prompt and answer."""
    section = job.config.generation
    eos_ids = () if section.ignore_eos else checkpoint.eos_token_ids
    num_rows = min(section.max_num_seqs, len(job.prompts))
    return GenerationLoop(
        decoder,
        decoder.new_cache(num_rows, cache_length(job.prompts)),
        sampling(section),
        seed=section.seed,
        eos_ids=(*eos_ids, *writer.stop_ids) if writer else eos_ids,
        prefill_chunk=section.prefill_chunk,
        on_token=writer.take if writer else None,
    )


def requests(prompts: Sequence[Prompt]) -> list[Request]:
    return [Request(item.index, item.token_ids, item.max_new_tokens) for item in prompts]


def sampling(section: GenerationSection) -> Sampling:
    return Sampling(
        section.do_sample,
        section.temperature,
        section.top_k,
        section.top_p,
        section.repetition_penalty,
    )


def _report(rank: Rank, timings: Timings, loaded: LoadTimings) -> None:
    """report.json, by rank 0, with every rank's cores and memory, and the stages of the start."""
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    counts = dict(rank.group.counts)
    mine = {"peak_rss_bytes": peak_bytes, "load": asdict(loaded), **rank.seat.report()}
    ranks = rank.gather(mine)
    if ranks is None:
        return
    started_at = rank.timeline.started_at
    report = {
        "task": rank.job.config.task.name,
        "tp": rank.group.size,
        "device": str(rank.device.type),
        "weight_bytes": [part["load"].pop("weight_bytes") for part in ranks],
        "peak_rss_bytes": [part.pop("peak_rss_bytes") for part in ranks],
        "collectives": counts,
        "first_token_s": (timings.first_token_at or started_at) - started_at,
        "start": rank.timeline.durations(),
        "ranks": ranks,
        **_rates(timings),
    }
    rank.run_dir.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _rates(timings: Timings) -> dict[str, Any]:
    values = {key: value for key, value in asdict(timings).items() if key != "first_token_at"}
    values["prefill_tokens_per_s"] = timings.prefill_tokens / max(timings.prefill_s, 1e-9)
    values["decode_tokens_per_s"] = timings.decode_tokens / max(timings.decode_s, 1e-9)
    return values
