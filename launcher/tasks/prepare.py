"""prepare: a checkpoint -> quantized shards for each rank, in one pass over the source."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launcher.environment.worker import WorkerEnvironment
from launcher.output import num_writers
from launcher.resolve import Resolved, model_overrides, resolve
from launcher.schema import Config
from launcher.tasks.prepare_job import check_prepare


def run(config: Config, environment: WorkerEnvironment) -> None:
    """Write the shards of all ranks from this one process.

    Raises:
        ConfigError: no checkpoint or output is named, or `output` exists.
    """
    output = check_prepare(config)
    resolved = resolve(config, environment)
    for note in resolved.notes:
        print(f"shardrun: {note}", file=sys.stderr)
    import torch  # here, so that a refusal need not wait for it

    from launcher.tasks.checksums import check_all_shards

    check_all_shards(resolved.config, resolved.checkpoint)

    num_threads = num_writers()
    # One tensor a thread: torch's own threads would only get in each other's way.
    torch.set_num_threads(1)
    started = time.perf_counter()
    num_bytes = _write(resolved, output, num_threads)
    _print_summary(resolved, output, num_bytes, time.perf_counter() - started)


def _write(resolved: Resolved, output: Path, num_threads: int) -> int:
    from tqdm import tqdm

    from parallel.checkpoint.store import source_bytes, write_prepared

    assert resolved.config.parallel.tp is not None
    source = resolved.checkpoint.source
    total = source_bytes(resolved.layout, source)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="prepare", disable=not sys.stderr.isatty()
    ) as bar:
        write_prepared(
            resolved.layout,
            source,
            resolved.config.parallel.tp,
            output,
            overrides=model_overrides(resolved.config),
            num_threads=num_threads,
            on_bytes=bar.update,
        )
    return total


def _print_summary(resolved: Resolved, output: Path, num_bytes: int, seconds: float) -> None:
    size = resolved.config.parallel.tp
    assert size is not None
    largest = max(resolved.layout.rank_bytes(rank, size) for rank in range(size))
    print(
        f"{output}: tp={size}, {resolved.layout.scheme.label}, "
        f"{largest / 1e9:.3g} GB a rank from {num_bytes / 1e9:.3g} GB in {seconds:.1f} s "
        f"({num_bytes / 1e9 / max(seconds, 1e-9):.2f} GB/s)"
    )
