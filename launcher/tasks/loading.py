"""A task's model comes into memory: each rank's part, with progress, and how fast it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from launcher.host.device import resolve_dtype
from launcher.host.kernels import packing_of
from launcher.job import Prompt
from launcher.progress import open_bar
from launcher.ranks.rank import Rank
from parallel.checkpoint.memory import Memory
from parallel.checkpoint.open import Checkpoint
from parallel.group import Group
from parallel.load import LoadTimings, load_decoder
from parallel.model.decoder import Decoder
from quant.kernels.choice import open_kernel
from quant.scheme import QuantScheme

# Below it nobody asks how fast it was, unless they sit at a terminal.
_WORTH_SAYING_S = 1.0


def open_decoder(
    rank: Rank,
    checkpoint: Checkpoint,
    group: Group,
    scheme: QuantScheme | None = None,
    *,
    max_length: int | None = None,
) -> tuple[Decoder, LoadTimings]:
    """This rank's part of the model, from a prepared directory or sharded on the fly.

    Args:
        group: the ranks that share the model; not always all ranks of the job.
        scheme: in place of the job's.
        max_length: the longest sequence; None: the longest prompt with its answer.
    """
    config = rank.job.config
    layout = checkpoint.layout(
        scheme or config.quant.scheme(), vocab_emb_dp=config.parallel.vocab_emb_dp
    )
    dtype = resolve_dtype(config.dtype, checkpoint.config.dtype, rank.device)
    memory = Memory(layout, str(dtype).removeprefix("torch."), packing_of(config))
    rank.say_doing("loading weights")
    with _loading_bar(rank, memory.weight_bytes(group.rank, group.size)) as bar:
        loaded = load_decoder(
            layout,
            checkpoint.source,
            group,
            dtype,
            rank.device,
            max_length=max_length or cache_length(rank.job.prompts),
            kernel=open_kernel(config.kernel),
            exact_sums=config.parallel.exact_sums,
            on_bytes=bar.update,
        )
    rank.say_doing("")
    return loaded


def _loading_bar(rank: Rank, num_bytes: int) -> tqdm[Any]:
    """Progress of loading on rank 0's console, gone when it is done."""
    is_shown = rank.group.rank == 0
    return open_bar(
        rank.console,
        is_shown=is_shown,
        total=num_bytes,
        unit="B",
        unit_scale=True,
        desc="loading",
        leave=False,
    )


def say_loaded(rank: Rank, timings: LoadTimings) -> None:
    """One line from rank 0 for all ranks, which must all call it."""
    parts = rank.gather(vars(timings))
    if parts is None:
        return
    seconds = max(part["wall_s"] for part in parts)
    if seconds >= _WORTH_SAYING_S or rank.console.isatty():
        gb, disk_gb = (
            sum(part[key] for part in parts) / 1e9 for key in ("weight_bytes", "disk_bytes")
        )
        print(
            f"shardrun: loaded {gb:.3g} GB on {len(parts)} rank{'s' * (len(parts) > 1)} in "
            f"{seconds:.1f} s ({gb / seconds:.2f} GB/s; {disk_gb:.3g} GB came from the disk)",
            file=rank.console,
        )


def cache_length(prompts: Sequence[Prompt]) -> int:
    """Positions of one row of the cache."""
    return max(len(item.token_ids) + item.max_new_tokens for item in prompts)
