"""The part of each rank in a `prepare` of several processes: they calibrate together, where the scheme
asks for it, and share the reading of the source.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from launcher.job import tokenizer_path
from launcher.output import num_writers
from launcher.progress import open_bar
from launcher.ranks.rank import Rank
from launcher.resolve import open_job
from launcher.schema import model_overrides
from launcher.tasks.prepare.calibrate import calibrate_rank
from launcher.tasks.prepare.job import calibrates
from launcher.tasks.prepare.report import Report, write_report
from launcher.tasks.prepare.summary import print_summary
from parallel.checkpoint.layout import Layout
from parallel.checkpoint.source import Source
from parallel.checkpoint.store import source_bytes, write_prepared


def run_rank(rank: Rank) -> None:
    """One rank's part.

    Raises:
        RunError: the perplexity has grown by more than is allowed; nothing is written then.
    """
    config = rank.job.config
    output = Path(str(config.output))
    checkpoint = open_job(config)
    layout = checkpoint.layout(config.quant.scheme(), vocab_emb_dp=config.parallel.vocab_emb_dp)
    if not calibrates(config):
        seconds = _write(rank, checkpoint.source, layout, output)
        if rank.group.rank == 0:
            size, ranks = rank.job.tp, config.prepare.ranks
            print_summary(layout, checkpoint.source, size, ranks, output, seconds)
        return
    found = calibrate_rank(rank, checkpoint, layout, output)
    _write(rank, found.source, layout, output)
    if rank.group.rank == 0:
        shutil.rmtree(found.state_dir)
        report = Report(
            layout, checkpoint.source, rank.job, found.errors, found.perplexities, found.seconds
        )
        write_report(report, output, rank.run_dir)


def _write(rank: Rank, source: Source, layout: Layout, output: Path) -> float:
    """The seconds that it took."""
    started = time.perf_counter()
    # Bytes of this rank's share: the others' are alike.
    ranks = rank.job.config.prepare.ranks
    total = source_bytes(layout, source, rank.job.tp, ranks) // rank.group.size
    with open_bar(
        rank.console,
        is_shown=rank.group.rank == 0,
        total=total,
        desc="prepare",
        unit="B",
        unit_scale=True,
        leave=False,
    ) as bar:
        write_prepared(
            layout,
            source,
            rank.job.tp,
            output,
            ranks=ranks,
            overrides=model_overrides(rank.job.config),
            tokenizer=tokenizer_path(rank.job.config),
            group=rank.group,
            num_threads=num_writers(),
            on_bytes=bar.update,
        )
    return time.perf_counter() - started
