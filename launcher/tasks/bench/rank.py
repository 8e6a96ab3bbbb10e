"""bench: prefill and decode of a checkpoint, or of a shape with random weights, timed apart.

Each batch size with each prompt length is one case: a barrier, the prefill, a barrier, the decode,
several times over. Between the cases all ranks read memory at once: that is the ceiling. Rank 0
prints a table and writes result.jsonl; the whole run of several sizes is the launcher's
(launcher/tasks/bench/sizes.py).
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from launcher.host.bandwidth import measure_group_bandwidth
from launcher.host.kernels import packing_of
from launcher.host.load import LoadMark, other_cores
from launcher.host.memory import peak_bytes, reset_peak
from launcher.job import Job, Prompt
from launcher.progress import open_bar
from launcher.ranks.rank import Rank
from launcher.resolve import is_shape_alone, open_job
from launcher.tasks.bench.case import Phase, Runner
from launcher.tasks.bench.plot import draw_decode
from launcher.tasks.bench.record import Host, Measured, Record, Run, make_record
from launcher.tasks.bench.simulate import CollectiveCost
from launcher.tasks.bench.table import print_records
from launcher.tasks.bench.work import Case, cases, decode_work, num_steps, prefill_work
from launcher.tasks.loading import open_decoder
from parallel.checkpoint.layout import Layout
from parallel.checkpoint.memory import Memory
from parallel.checkpoint.open import Checkpoint
from parallel.group import Group, SimulatedGroup
from parallel.model.decoder import Decoder
from parallel.model.placements import HEAD
from quant.packing import has_product


def run_rank(rank: Rank) -> None:
    """One rank's part: load, run every case; rank 0 prints and writes the records."""
    bench = _load(rank)
    bar = _progress(rank)
    records: list[Record] = []
    bandwidths = measure_group_bandwidth(rank.group, rank.device)
    for case in cases(rank.job.config):
        runs, host = bench.measure(case, bar)
        after = measure_group_bandwidth(rank.group, rank.device)
        if bench.is_reporter:
            records += bench.records(case, runs, host, [*bandwidths, *after])
        bandwidths = after
    bar.close()
    if rank.job.config.bench.profile:
        _profile(bench, rank)
    if bench.is_reporter:
        _report(rank, records)


@dataclass(frozen=True)
class _Bench:
    """A loaded rank.

    Attributes:
        decoder: its group is the model's; the rank's own may be another, where one is simulated.
        context: what is true of every record.
    """

    rank: Rank
    decoder: Decoder
    layout: Layout
    context: dict[str, Any]

    @property
    def is_reporter(self) -> bool:
        return self.rank.group.rank == 0

    def measure(self, case: Case, bar: tqdm[Any]) -> tuple[list[tuple[Run, Run]], Host]:
        """Repeats of (prefill, decode), each as every rank saw it, and what the host was at."""
        section = self.rank.job.config.bench
        ids_BP = _random_ids(self.rank, case, self.layout.config.vocab_size)
        runner = self._runner(case)
        reset_peak(self.rank.device)
        for _ in range(section.warmup):
            runner.run(ids_BP, dataclasses.replace(case, new_tokens=min(case.new_tokens, 2)))
            bar.update()
        runs, start = [], LoadMark.now()
        for _ in range(section.repeats):
            runs.append(_gather(self.rank, runner.run(ids_BP, case)))
            bar.update()
        return runs, self._host(start, LoadMark.now())

    def _host(self, start: LoadMark, end: LoadMark) -> Host:
        """Memory and load; of this rank alone but on rank 0."""
        mine = [float(peak_bytes(self.rank.device)), end.own_s - start.own_s]
        parts = (
            self.rank.group.gather(torch.tensor(mine, dtype=torch.float64, device=self.rank.device))
            or ()
        )
        own_s = [float(part[1]) for part in parts]
        return Host([int(part[0]) for part in parts], other_cores(start, end, own_s))

    def records(
        self, case: Case, runs: list[tuple[Run, Run]], host: Host, bandwidths: list[float]
    ) -> list[Record]:
        """The lines of result.jsonl of one case: prefill, then decode."""
        tp = self.decoder.group.size
        simulated = self.rank.job.config.parallel.simulate_rank
        ranks = range(tp) if simulated is None else (simulated,)
        dtype = str(self.decoder.dtype).removeprefix("torch.")
        memory = Memory(self.layout, dtype, packing_of(self.rank.job.config))
        found = []
        for index, (phase, work) in enumerate((("prefill", prefill_work), ("decode", decode_work))):
            done = work(memory, case, ranks, tp)
            parts = [run[index] for run in runs]
            found.append(
                make_record(
                    {**self.context, "steps": num_steps(phase, case)},
                    Measured(phase, case, parts, done, bandwidths, host),
                )
            )
        return found

    def profile(self) -> str:
        """The operations of the first case's decode that take the most time of this rank."""
        case = next(cases(self.rank.job.config))
        ids_BP = _random_ids(self.rank, case, self.layout.config.vocab_size)
        with torch.profiler.profile() as profiler:
            self._runner(case).run(ids_BP, case)
        return str(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))

    def _runner(self, case: Case) -> Runner:
        cache = self.decoder.new_cache(case.batch_size, case.length)
        return Runner(self.decoder, cache, self.rank.group.barrier)


def _load(rank: Rank) -> _Bench:
    start = time.perf_counter()
    config = rank.job.config
    checkpoint = open_job(config)
    job = Job(config, (_longest_prompt(rank.job),))
    decoder, loaded = open_decoder(
        dataclasses.replace(rank, job=job), checkpoint, _model_group(rank)
    )
    rank.group.barrier()
    load_s = time.perf_counter() - start
    layout = checkpoint.layout(config.quant.scheme(), vocab_emb_dp=config.parallel.vocab_emb_dp)
    context = {
        **_context(rank, checkpoint, layout, decoder),
        "load_s": load_s,
        "loading": asdict(loaded),
    }
    return _Bench(rank, decoder, layout, context)


def _longest_prompt(job: Job) -> Prompt:
    """The loader sizes its tables by the job's prompts; those of a bench are drawn later."""
    longest = max(cases(job.config), key=lambda case: case.length)
    return Prompt(0, None, "", (0,) * longest.prompt_length, longest.new_tokens)


def _model_group(rank: Rank) -> Group:
    """The group that the model computes with: this job's, or a simulated one of its size."""
    config = rank.job.config
    if config.parallel.simulate_rank is None:
        return rank.group
    cost = CollectiveCost.of(config.bench, rank.job.tp)
    return SimulatedGroup(config.parallel.simulate_rank, rank.job.tp, cost)


def _context(
    rank: Rank, checkpoint: Checkpoint, layout: Layout, decoder: Decoder
) -> dict[str, Any]:
    config = rank.job.config
    dtype = str(decoder.dtype).removeprefix("torch.")
    simulated = config.parallel.simulate_rank
    cost = CollectiveCost.of(config.bench, rank.job.tp)
    is_random = is_shape_alone(config)
    return {
        "tp": rank.job.tp,
        "estimate": simulated is not None,
        "simulated_rank": simulated,
        "collective_cost": None if simulated is None else asdict(cost),
        "weights": f"random weights of seed {config.seed}" if is_random else str(checkpoint.path),
        "scheme": layout.scheme.label,
        "lm_head": layout.schemes[HEAD].weight_dtype if HEAD in layout.schemes else dtype,
        "kernel": _kernels(config.kernel, layout),
        **asdict(checkpoint.config),
        "dtype": dtype,
        "device": rank.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _kernels(name: str, layout: Layout) -> str | None:
    """The job's kernel, and for what the reference stands in; None: nothing is quantized."""
    others = [
        label
        for label, scheme in {item.label: item for item in layout.schemes.values()}.items()
        if not has_product(name, scheme)
    ]
    if not layout.schemes:
        return None
    return f"{name}, reference for {', '.join(others)}" if others else name


def _random_ids(rank: Rank, case: Case, vocab_size: int) -> Tensor:
    """Prompts [B, P] of random tokens, the same on every rank."""
    random = torch.Generator().manual_seed(rank.job.config.seed % 2**63)
    shape = (case.batch_size, case.prompt_length)
    return torch.randint(vocab_size, shape, generator=random).to(rank.device)


def _gather(rank: Rank, phases: tuple[Phase, Phase]) -> tuple[Run, Run]:
    """Both phases as every rank saw them; empty but on rank 0."""
    prefills, decodes = (_gather_phase(rank, phase) for phase in phases)
    return prefills, decodes


def _gather_phase(rank: Rank, phase: Phase) -> Run:
    """All ranks made the same calls, so the rows are of one length."""
    mine = torch.tensor([phase.seconds, *phase.calls_s], dtype=torch.float64, device=rank.device)
    parts = [part.tolist() for part in rank.group.gather(mine) or []]
    return [Phase(seconds, tuple(calls)) for seconds, *calls in parts]


def _progress(rank: Rank) -> tqdm[Any]:
    section = rank.job.config.bench
    return open_bar(
        rank.console,
        is_shown=rank.group.rank == 0,
        total=len(list(cases(rank.job.config))) * (section.warmup + section.repeats),
        desc=f"tp={rank.job.tp}",
        unit="run",
    )


def _profile(bench: _Bench, rank: Rank) -> None:
    """All ranks run, or the others would wait; rank 0 writes."""
    text = bench.profile()
    if bench.is_reporter:
        path = rank.run_dir.path / "profile.txt"
        path.write_text(text, encoding="utf-8")
        print(f"profile of rank 0: {path}")


def _report(rank: Rank, records: list[Record]) -> None:
    lines = (json.dumps(record) + "\n" for record in records)
    rank.run_dir.result.write_text("".join(lines), encoding="utf-8")
    print_records(records)
    if rank.job.config.bench.plot:
        print(draw_decode(records, rank.run_dir.plot), flush=True)
