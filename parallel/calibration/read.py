"""What calibration reads of a checkpoint: one decoder layer at a time, and the samples' embeddings.

Nothing is copied that need not be: a weight stays in its stored dtype, a view of the mapped file
where its reader gives one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.calibration.result import MODULES, NORMS
from parallel.checkpoint.source import Source
from parallel.errors import CheckpointError
from parallel.model.config import ModelConfig
from parallel.model.placements import EMBEDDING, HEAD_NORMS
from quant.methods.layer import Layer, Product, blocks

# Rows of the embedding that are read at a time.
EMBEDDING_ROWS = 4096


def read_layer(source: Source, config: ModelConfig, index: int) -> Layer:
    """A decoder layer as floats, whole.

    Raises:
        CheckpointError: a weight holds an infinity or a NaN.
    """
    prefix = f"model.layers.{index}."
    products = {name: _read_product(source, prefix + module) for name, module in MODULES.items()}
    norms = {name: _read(source, f"{prefix}{name}.weight") for name in NORMS}
    for name in HEAD_NORMS if config.qk_norm else ():
        norms[name] = _read(source, f"{prefix}self_attn.{name}.weight")
    return Layer(products, norms, config.head_dim, config.windows[index])


def embed(
    source: Source, samples: Mapping[int, Sequence[int]], dtype: torch.dtype
) -> dict[int, Tensor]:
    """The embeddings [T, D] of samples of token ids, by the samples' indices.

    Raises:
        CheckpointError: a row that is needed holds an infinity or a NaN.
    """
    num_rows, width = source.tensors[EMBEDDING].shape
    ids = {index: torch.tensor(list(sample)) for index, sample in samples.items()}
    found = {index: torch.empty(len(sample), width, dtype=dtype) for index, sample in ids.items()}
    for start in range(0, num_rows, EMBEDDING_ROWS):
        stop = min(start + EMBEDDING_ROWS, num_rows)
        rows_RD = source.read(EMBEDDING, (slice(start, stop), slice(0, width)))
        for index, sample_T in ids.items():
            inside_T = (sample_T >= start) & (sample_T < stop)
            found[index][inside_T] = F.embedding(sample_T[inside_T] - start, rows_RD).to(dtype)
    for sample_TD in found.values():
        _check_finite(source, EMBEDDING, [sample_TD])
    return found


def _read_product(source: Source, module: str) -> Product:
    bias = f"{module}.bias"
    bias_N = _read(source, bias) if bias in source.tensors else None
    return Product(_read(source, f"{module}.weight"), bias_N)


def _read(source: Source, name: str) -> Tensor:
    shape = source.tensors[name].shape
    tensor = source.read(name, tuple(slice(0, length) for length in shape))
    _check_finite(source, name, (tensor[rows] for rows in blocks(shape[0])))
    return tensor


def _check_finite(source: Source, name: str, parts: Iterable[Tensor]) -> None:
    if not all(bool(part.isfinite().all()) for part in parts):
        raise CheckpointError(
            f"{source.path}: {name} must hold finite numbers, but has an infinity or a NaN; "
            "download it again."
        )
