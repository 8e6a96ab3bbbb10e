"""export: a prepared checkpoint -> one Hugging Face checkpoint, compressed-tensors where quantized."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launcher.environment.worker import WorkerEnvironment
from launcher.failures import ConfigError
from launcher.job import tokenizer_path
from launcher.output import new_directory, num_writers
from launcher.resolve import checkpoint_path
from launcher.schema import Config, model_overrides
from parallel.checkpoint.layout import Layout
from parallel.checkpoint.open import Checkpoint, open_checkpoint, own_size
from quant.scheme import QuantScheme


def run(config: Config, _environment: WorkerEnvironment) -> None:
    """Write one checkpoint of all ranks' shards from this one process.

    Raises:
        ConfigError: no prepared checkpoint or no output is named, or `output` exists.
        CheckpointError: compressed-tensors has no place for the scheme.
    """
    output = new_directory(config)
    checkpoint = _open_prepared(config)
    layout = checkpoint.layout(QuantScheme())
    import torch  # here, so that a refusal need not wait for it

    from launcher.tasks.checksums import check_all_shards

    check_all_shards(config, checkpoint)

    num_threads = num_writers()
    # One tensor a thread: torch's own threads would only get in each other's way.
    torch.set_num_threads(1)
    started = time.perf_counter()
    num_bytes = _write(config, checkpoint, layout, output, num_threads)
    seconds = time.perf_counter() - started
    print(
        f"{output}: {layout.scheme.label}, {num_bytes / 1e9:.3g} GB of "
        f"{checkpoint.prepared_size} ranks' shards in {seconds:.1f} s"
    )


def _open_prepared(config: Config) -> Checkpoint:
    if config.checkpoint is None:
        raise ConfigError(
            "export needs `checkpoint`; write checkpoint=DIRECTORY of a prepared one."
        )
    path = checkpoint_path(config)
    if own_size(path) is None:
        raise ConfigError(
            f"`checkpoint` must be one that prepare wrote, but {path} is none; prepare it first, "
            "with the `quant` that you want."
        )
    return open_checkpoint(path, model_overrides(config))


def _write(
    config: Config, checkpoint: Checkpoint, layout: Layout, output: Path, num_threads: int
) -> int:
    from launcher.progress import open_bar
    from parallel.checkpoint.export import export_bytes, write_export

    total = export_bytes(layout)
    with open_bar(sys.stderr, total=total, unit="B", unit_scale=True, desc="export") as bar:
        write_export(
            layout,
            checkpoint.source,
            output,
            max_shard_bytes=config.export.max_shard_bytes,
            overrides=model_overrides(config),
            tokenizer=tokenizer_path(config),
            num_threads=num_threads,
            on_bytes=bar.update,
        )
    return total
