"""Whether lm_head is the embedding: config.json says so, and the files have the last word.

As in transformers: two that are equal are one, two that differ are both kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parallel.checkpoint.readers.huggingface import HuggingFaceSource
from parallel.checkpoint.source import FLOAT_DTYPES, Source
from parallel.model.config import ModelConfig
from parallel.model.placements import EMBEDDING, HEAD

if TYPE_CHECKING:
    from torch import Tensor

# Read at a time.
_BLOCK_ENTRIES = 1 << 23
# Compared at a time: torch divides more among threads, and the process of a rank may have none before it
# is bound to its cores.
_COMPARED_ENTRIES = 1 << 15

KEPT_APART = (
    f"{HEAD} differs from {EMBEDDING}, though config.json ties them (tie_word_embeddings): both are "
    "kept, as in transformers"
)


def has_own_head(config: ModelConfig, source: Source, *, most_rows: int | None = None) -> bool:
    """Whether the config ties lm_head to the embedding, and the files hold another all the same.

    Where both are there and equal, this reads them to the end; where they differ, up to the difference.
    Every process finds the same, as all read the same files.

    Args:
        source: not a prepared one, whose own config.json says what `prepare` found.
        most_rows: how many rows are compared; None: all.
    """
    embedding, head = (source.tensors.get(name) for name in (EMBEDDING, HEAD))
    if not config.tie_word_embeddings or embedding is None or head is None:
        return False
    if not {embedding.dtype, head.dtype} <= set(FLOAT_DTYPES) or len(embedding.shape) != 2:
        return False  # quantized, which its scheme says, or refused by its dtype or shape later
    if embedding.shape != head.shape:
        return True
    if isinstance(source, HuggingFaceSource) and source.are_one(EMBEDDING, HEAD):
        return False
    num_rows, num_columns = embedding.shape
    step = max(1, _BLOCK_ENTRIES // max(1, num_columns))
    for start in range(0, min(num_rows, most_rows or num_rows), step):
        index = (slice(start, min(start + step, num_rows)), slice(0, num_columns))
        if not _are_equal(source.read(EMBEDDING, index), source.read(HEAD, index)):
            return True
    return False


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Equal numbers, also in two dtypes; a NaN equals nothing, as in transformers."""
    import torch

    parts = (tensor.reshape(-1).split(_COMPARED_ENTRIES) for tensor in (first, second))
    if first.dtype == second.dtype:
        return all(torch.equal(*pair) for pair in zip(*parts, strict=True))
    return all(torch.equal(one.float(), other.float()) for one, other in zip(*parts, strict=True))
