"""Rotary position embeddings, in the half-split form of Hugging Face checkpoints.

Su et al., RoFormer (2021); the llama3 stretch after the reference code of Llama 3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parallel.model.config import ModelConfig
from parallel.model.rope_scaling import RopeScaling


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position, float32 [head_dim / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    plain = 1.0 / config.rope_theta**exponents
    return plain if config.rope_scaling is None else _scaled(plain, config.rope_scaling)


def cos_sin_table(config: ModelConfig, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, [length, 1, head_dim], computed in float32, stored as `dtype`.

    The first half of the sines is negative, as quant.elementwise.rotate wants it.
    """
    positions = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config)).unsqueeze(1)
    cos, sin = angles.cos().repeat(1, 1, 2), angles.sin()
    return cos.to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def _scaled(plain: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "linear":
        return plain / scaling.factor
    return _llama3(plain, scaling)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Long waves divided by factor, short ones kept, those between interpolated."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / scaling.factor
