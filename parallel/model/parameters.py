"""What a rank holds in memory: the parameters of the step, and the tensors each is joined from.

q, k and v multiply the same activations, and so do gate and up: joined in memory they are one
product, which reads the activations once and keeps every core at work. On disk they stay apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from parallel.model.placements import Row, Table

# The fused parameter's name and its parts, in the order of their output channels.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class Parameter:
    """One tensor of the step.

    Attributes:
        name: the checkpoint's, or that of a fused product such as `….self_attn.qkv_proj.weight`.
        rows: the tensors that it is joined from, each sliced for the rank first.
    """

    name: str
    rows: tuple[Row, ...]

    @property
    def is_product(self) -> bool:
        """Whether it is a linear's weight, which a kernel packs."""
        return self.rows[0].is_linear


def parameters(table: Table, quantized: Collection[str]) -> list[Parameter]:
    """The parameters of a model, in the order of a step.

    Args:
        quantized: the tensors that are quantized; a product is fused where all its parts are, or
            none is.
    """
    fused: dict[str, str] = {}
    for path, parts in _fusable(table):
        if len({f"{part}.weight" in quantized for part in parts}) == 1:
            fused |= dict.fromkeys(parts, path)
    rows: dict[str, list[Row]] = {}
    for row in table.values():
        name = fused.get(row.module, row.module) + row.name.removeprefix(row.module)
        rows.setdefault(name, []).append(row)
    return [Parameter(name, tuple(parts)) for name, parts in rows.items()]


def _fusable(table: Table) -> Iterator[tuple[str, list[str]]]:
    """Every product of the model that may be fused, and the modules of its parts."""
    for path, parts in FUSED.items():
        for row in table.values():
            prefix = row.module.removesuffix(parts[0])
            if row.is_linear and prefix != row.module:
                yield prefix + path, [prefix + part for part in parts]
