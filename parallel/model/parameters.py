"""What a rank holds in memory: the parameters of the step, and the tensors each is joined from.

q, k and v multiply the same activations, and so do gate and up: joined in memory they are one
product, which reads the activations once and keeps every core at work. On disk they stay apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from parallel.model.placements import Row, Table
from quant.errors import QuantError
from quant.scheme import LinearScheme

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


def parameters(table: Table) -> list[Parameter]:
    """The parameters of a model, in the order of a step."""
    linears = [row.module for row in table.values() if row.is_linear]
    fused = {part: path for path, parts in _products(linears) for part in parts}
    rows: dict[str, list[Row]] = {}
    for row in table.values():
        name = fused.get(row.module, row.module) + row.name.removeprefix(row.module)
        rows.setdefault(name, []).append(row)
    return [Parameter(name, tuple(parts)) for name, parts in rows.items()]


def check_fused(schemes: Mapping[str, LinearScheme | None]) -> None:
    """Raise QuantError where the parts of one product are quantized differently.

    Args:
        schemes: of each linear module; None: it is not quantized.
    """
    for path, parts in _products(schemes):
        if len({schemes[part] for part in parts}) == 1:
            continue
        names = [part.rpartition(".")[2] for part in parts]
        said = ", ".join(f"{part.rpartition('.')[2]} {_label(schemes[part])}" for part in parts)
        raise QuantError(
            f"`quant` must treat {', '.join(names)} alike, which are one product in memory, but makes "
            f"of {path.rpartition('.')[0]}: {said}; name all of them in quant.modules_to_not_convert "
            "or by one policy of quant.layer_policies, or none."
        )


def _label(scheme: LinearScheme | None) -> str:
    return "unquantized" if scheme is None else scheme.full_label


def _products(modules: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Every fused product of the model, and the modules of its parts."""
    for name in modules:
        for path, parts in FUSED.items():
            prefix = name.removesuffix(parts[0])
            if prefix != name:
                yield prefix + path, [prefix + part for part in parts]
