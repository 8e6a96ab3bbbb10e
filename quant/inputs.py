"""The inputs of a decoder layer's products. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

# In the order of a step, and the products that read each.
INPUTS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
