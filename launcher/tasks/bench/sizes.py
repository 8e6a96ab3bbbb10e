"""The launcher's part of a bench: check it, start the ranks of each size, gather what they found.

Needs no torch until the ranks are started.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from launcher.environment.worker import WorkerEnvironment
from launcher.failures import ConfigError
from launcher.host.kernels import choose_kernel
from launcher.host.memory import host_bytes
from launcher.job import Job
from launcher.resolve import Resolved, check_effects, check_gpus, resolve
from launcher.run_dir import RunDir
from launcher.schema import Config
from launcher.tasks.bench.plot import draw_decode
from launcher.tasks.bench.record import Record, read_records
from launcher.tasks.bench.work import cases
from launcher.timeline import Timeline
from parallel.model.config import ModelConfig


def run_sizes(config: Config, environment: WorkerEnvironment, timeline: Timeline) -> int:
    """Run a bench of a plain command, one size after the other; returns the exit status.

    Raises:
        ConfigError, LaunchError, ModelError, …: before a process starts, of any of the sizes.
        RunError: a rank failed; what the sizes before it found is kept.
    """
    jobs, notes = _jobs(config, environment)
    for note in notes:
        print(f"shardrun: {note}", file=sys.stderr, flush=True)
    from launcher.ranks.workers import preload_torch, run_workers

    preload_torch()
    timeline.mark("configuration")
    whole = replace(jobs[0].config, bench=config.bench, parallel=config.parallel)
    run_dir = RunDir.create(Job(whole, ()))
    parts = []
    status = 0
    for job in jobs:
        parts.append(run_dir.part(f"tp_{job.tp}", job))
        status = run_workers(
            parts[-1], _num_processes(job), replace(timeline, ends=[*timeline.ends])
        )
        if status != 0:
            break
        _gather(run_dir, parts)
        print(flush=True)
    if status == 0:
        _conclude(run_dir, config)
    return status


def make_bench_job(
    config: Config, environment: WorkerEnvironment, *, chooses_kernel: bool = True
) -> tuple[Job, tuple[str, ...]]:
    """The job of one size, and what to say about it.

    Args:
        chooses_kernel: False leaves that to another rank.

    Raises:
        ConfigError: a key without effect, a length beyond the context, or a rank that is none.
    """
    _check_keys(config, environment)
    resolved = resolve(config, environment)
    check_effects(config)
    if config.parallel.simulate_rank is None:
        check_gpus(config, resolved, environment)
    _check_lengths(config, resolved.checkpoint.config)
    _check_simulated(Job(resolved.config, ()))
    _check_memory(resolved, environment)
    if not chooses_kernel:
        return Job(resolved.config, ()), resolved.notes
    # Last: the first time on a machine it takes seconds, which a refusal should not.
    config, notes = choose_kernel(resolved.config, resolved.layout.labels)
    return Job(config, ()), resolved.notes + notes


def _jobs(config: Config, environment: WorkerEnvironment) -> tuple[list[Job], tuple[str, ...]]:
    """A job for each size; the picture and the whole list are the launcher's."""
    if config.bench.tp is not None and config.parallel.tp is not None:
        raise ConfigError("`bench.tp` and `parallel.tp` are both given; give one of them.")
    sizes: Sequence[int | None] = [config.parallel.tp] if config.bench.tp is None else _each(config)
    section = replace(config.bench, tp=None, plot=False)
    made = [
        make_bench_job(
            replace(config, bench=section, parallel=replace(config.parallel, tp=size)), environment
        )
        for size in sizes
    ]
    return [job for job, _ in made], tuple(
        dict.fromkeys(note for _, notes in made for note in notes)
    )


def _each(config: Config) -> list[int]:
    sizes = config.bench.tp or []
    if len(set(sizes)) < len(sizes):
        raise ConfigError(f"`bench.tp` must name each size once, but is {sizes}.")
    return sizes


def _check_keys(config: Config, environment: WorkerEnvironment) -> None:
    if config.bench.tp is not None:
        raise ConfigError(
            f"`bench.tp` starts the ranks of each size itself, but {environment.launcher} has "
            "started these; leave it out."
        )
    if config.parallel.simulate_rank is None:
        for key in ("collective_latency_us", "collective_gb_s"):
            if getattr(config.bench, key) is not None:
                raise ConfigError(
                    f"`bench.{key}` has no effect while parallel.simulate_rank is null: real "
                    "collectives are measured; drop it."
                )
    elif not environment.is_plain:
        raise ConfigError(
            f"`parallel.simulate_rank` runs in one process, but {environment.launcher} has started "
            "several; start it by itself."
        )
    elif config.parallel.tp is None:
        raise ConfigError(
            "`parallel.simulate_rank` is a rank of parallel.tp, which is not given; "
            "write parallel.tp=8, or bench.tp=[8,16]."
        )


def _check_simulated(job: Job) -> None:
    simulated = job.config.parallel.simulate_rank
    if simulated is not None and simulated >= job.tp:
        raise ConfigError(
            f"`parallel.simulate_rank` must be 0 to {job.tp - 1} at tp={job.tp}, but is {simulated}."
        )


def _check_lengths(config: Config, model: ModelConfig) -> None:
    longest = max(cases(config), key=lambda case: case.length)
    context = model.max_position_embeddings
    if longest.length > context:
        raise ConfigError(
            f"`bench.prompt_lengths` and bench.new_tokens must fit the context of {context} tokens, "
            f"but {longest.prompt_length} + {longest.new_tokens} is {longest.length}; "
            "give shorter ones."
        )


def _check_memory(resolved: Resolved, environment: WorkerEnvironment) -> None:
    """A shape is a few words, and may stand for more than any host has."""
    config, layout, tp = resolved.config, resolved.layout, resolved.config.parallel.tp
    assert tp is not None
    if config.device == "cuda" or not environment.is_plain:
        return
    simulated = config.parallel.simulate_rank
    ranks = range(tp) if simulated is None else (simulated,)
    dtype = None if config.dtype == "auto" else config.dtype
    needed, here = sum(layout.rank_bytes(rank, tp, dtype) for rank in ranks), host_bytes()
    if needed > here:
        raise ConfigError(
            f"the weights at tp={tp} are {needed / 1e9:,.0f} GB, but this host has "
            f"{here / 1e9:,.0f} GB of memory; give fewer layers (model.num_hidden_layers=4), or "
            "one rank of a larger job (parallel.tp=8 parallel.simulate_rank=0)."
        )


def _num_processes(job: Job) -> int:
    return job.tp if job.config.parallel.simulate_rank is None else 1


def _records(parts: Sequence[RunDir]) -> list[Record]:
    return [record for part in parts for record in read_records(part.result)]


def _gather(run_dir: RunDir, parts: Sequence[RunDir]) -> None:
    """The records of all sizes so far, in one file."""
    lines = (json.dumps(record) + "\n" for record in _records(parts))
    run_dir.result.write_text("".join(lines), encoding="utf-8")


def _conclude(run_dir: RunDir, config: Config) -> None:
    print(f"records: {run_dir.result}")
    if config.bench.plot:
        print(draw_decode(read_records(run_dir.result), run_dir.plot))
