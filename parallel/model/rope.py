"""Rotary position embeddings, in the half-split form of Hugging Face checkpoints.

Su et al., RoFormer (2021); the llama3 stretch after the reference code of Llama 3.1, yarn after
Peng et al. (2023).
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
    return plain if config.rope_scaling is None else _scaled(plain, config, config.rope_scaling)


def cos_sin_table(config: ModelConfig, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, [length, 1, head_dim], computed in float32, stored as `dtype`.

    The first half of the sines is negative, as quant.elementwise.rotate wants it.
    """
    positions = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config)).unsqueeze(1)
    scale = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    cos, sin = angles.cos().repeat(1, 1, 2) * scale, angles.sin() * scale
    return cos.to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def _scaled(plain: Tensor, config: ModelConfig, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "linear":
        return plain / scaling.factor
    keep = _kept_by_yarn(config, scaling) if scaling.kind == "yarn" else _kept(plain, scaling)
    return keep * plain + (1 - keep) * plain / scaling.factor


def _kept(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """llama3: long waves are divided by factor, short ones kept, those between interpolated."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    return ((turns - scaling.low_freq_factor) / span).clamp(0, 1)


def _kept_by_yarn(config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """The same, but between two dimensions: those that turn beta_fast and beta_slow times."""
    low, high = (
        _dimension(config, scaling, turns) for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    span = high - low or 0.001
    return 1 - ((torch.arange(config.head_dim // 2) - low) / span).clamp(0, 1)


def _dimension(config: ModelConfig, scaling: RopeScaling, turns: float) -> float:
    """The dimension, a fraction, that turns so often in the original context."""
    positions = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
    return config.head_dim * math.log(positions) / (2 * math.log(config.rope_theta))
