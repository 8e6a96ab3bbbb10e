"""prepare: a checkpoint -> quantized shards for each rank, in one pass over the source."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launcher.environment.worker import WorkerEnvironment
from launcher.job import tokenizer_path
from launcher.output import num_writers
from launcher.resolve import Resolved, resolve
from launcher.schema import Config, model_overrides
from launcher.tasks.prepare.job import check_prepare, check_ranks


def run(config: Config, environment: WorkerEnvironment) -> None:
    """Write the shards of all ranks from this one process.

    Raises:
        ConfigError: no checkpoint or output is named, or `output` exists.
    """
    output = check_prepare(config)
    resolved = resolve(config, environment)
    check_ranks(resolved.config)
    for note in resolved.notes:
        print(f"shardrun: {note}", file=sys.stderr)
    import torch  # here, so that a refusal need not wait for it

    # One tensor a thread: torch's own threads would only get in each other's way.
    torch.set_num_threads(1)
    from launcher.tasks.checksums import check_all_shards
    from launcher.tasks.prepare.summary import print_summary
    from parallel.checkpoint.unfinished import unfinished_path

    check_all_shards(resolved.config, resolved.checkpoint)
    started = time.perf_counter()
    try:
        _write(resolved, output)
    except (KeyboardInterrupt, SystemExit):
        print(
            f"shardrun: what is done so far is kept in {unfinished_path(output)}: the same command goes "
            "on from there, or remove it",
            file=sys.stderr,
        )
        raise
    seconds = time.perf_counter() - started
    assert resolved.config.parallel.tp is not None
    size = resolved.config.parallel.tp
    ranks, source = resolved.config.prepare.ranks, resolved.checkpoint.source
    print_summary(resolved.layout, source, size, ranks, output, seconds)


def _write(resolved: Resolved, output: Path) -> None:
    from launcher.progress import open_bar
    from parallel.checkpoint.store import source_bytes, write_prepared

    config, source = resolved.config, resolved.checkpoint.source
    assert config.parallel.tp is not None
    total = source_bytes(resolved.layout, source, config.parallel.tp, config.prepare.ranks)
    with open_bar(sys.stderr, total=total, unit="B", unit_scale=True, desc="prepare") as bar:
        write_prepared(
            resolved.layout,
            source,
            config.parallel.tp,
            output,
            ranks=config.prepare.ranks,
            overrides=model_overrides(config),
            tokenizer=tokenizer_path(config),
            num_threads=num_writers(),
            on_bytes=bar.update,
        )
