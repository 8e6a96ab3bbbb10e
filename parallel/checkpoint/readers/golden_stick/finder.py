"""Every tensor of a model in Golden Stick's files, found and checked. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from parallel.checkpoint.readers.golden_stick.forms import CACHE_FORMS, Form, linear_forms
from parallel.checkpoint.readers.golden_stick.inventory import check_used_up, take_inventory
from parallel.checkpoint.readers.golden_stick.names import BIAS, WEIGHT
from parallel.checkpoint.readers.golden_stick.parts import (
    CacheParts,
    LinearParts,
    Parts,
    StoredPart,
)
from parallel.checkpoint.readers.golden_stick.places import Place, check_form, place_part
from parallel.checkpoint.readers.mindformers.files import WeightFiles
from parallel.checkpoint.readers.pieces import PiecedTensor
from parallel.errors import CheckpointError
from parallel.model.placements import Row, Table
from quant.scheme import LinearScheme


def find_parts(
    path: Path,
    ranks: Sequence[WeightFiles],
    table: Table,
    schemes: Mapping[str, LinearScheme | None],
    yaml: Path,
) -> Parts:
    """What the files hold of each tensor of a model.

    Args:
        path: their directory.
        table: the model's tensors, with static scales of its KV cache where the scheme has them.
        schemes: of each linear module, by the YAML.
        yaml: where the scheme is said.

    Raises:
        CheckpointError: a part is missing, or is of another dtype or shape; or there is one that the
            scheme has no place for.
    """
    return _Finder(path, ranks, table, schemes, yaml).find()


class _Finder:
    """Takes the parts out of `left`, until nothing may be left."""

    def __init__(
        self,
        path: Path,
        ranks: Sequence[WeightFiles],
        table: Table,
        schemes: Mapping[str, LinearScheme | None],
        yaml: Path,
    ) -> None:
        self.path, self.yaml, self.ranks = path, yaml, ranks
        self.table, self.schemes = table, schemes
        self.left = take_inventory(path, ranks, yaml)

    def find(self) -> Parts:
        floats: dict[str, PiecedTensor] = {}
        linears: dict[str, LinearParts] = {}
        caches: dict[str, CacheParts] = {}
        for row in self.table.values():
            scheme = self.schemes.get(row.module) if row.is_linear else None
            if row.is_kv_scale:
                if row.module not in caches:  # its values have a row of their own
                    caches[row.module] = self._take(row, CACHE_FORMS)
            elif scheme is None:
                floats[row.name] = self._take_float(row).tensor
            else:
                linears[row.module] = self._take_linear(row, scheme)
        check_used_up(self.path, self.left, self.table, self.schemes, self.yaml)
        return Parts(floats, linears, caches)

    def _take_linear(self, row: Row, scheme: LinearScheme) -> LinearParts:
        self._check_divides(row, scheme)
        kinds = self.left.get(row.module, {})
        has_bias = f"{row.module}.bias" in self.table
        forms = linear_forms(scheme, kinds, has_bias=has_bias)
        dim = getattr(row.placement, "dim", None)
        parts = self._take(row, forms, f", {scheme.full_label}")
        return LinearParts(row.module, scheme, row.shape, dim == 1, parts)

    def _take(self, row: Row, forms: Mapping[str, Form], label: str = "") -> dict[str, StoredPart]:
        parts: dict[str, StoredPart] = {}
        for kind, form in forms.items():
            place = self.left.get(row.module, {}).pop(kind, None)
            if place is not None:
                parts[kind] = self._place(row, place, form, label)
            elif form.is_needed:
                raise CheckpointError(
                    f"{self.path} lacks the {kind} of {row.module}, which {self.yaml.name} makes a part "
                    f"of it (quantization_config{label}); copy the checkpoint again, or use the YAML "
                    "that it was quantized with."
                )
        return parts

    def _take_float(self, row: Row) -> StoredPart:
        """A norm, an embedding, a bias, or a weight that is left alone."""
        kind = BIAS if row.name.endswith(".bias") else WEIGHT
        place = self.left.get(row.module, {}).pop(kind, None)
        if place is None:
            raise CheckpointError(
                f"{self.path} lacks {row.name}, or what MindFormers calls it; copy the checkpoint "
                f"again, or use its own {self.yaml.name}."
            )
        label = ", which leaves it unquantized" if row.is_linear else ""
        return self._place(row, place, Form.of_floats(len(row.shape)), label)

    def _place(self, row: Row, place: Place, form: Form, label: str) -> StoredPart:
        files = [rank.places[place.stored] for rank in self.ranks]
        rows = [self._row(module, row) for module in place.modules]
        axes = check_form(files, place, rows, form, f"{self.yaml.name}{label}")
        tensor, by_rank = place_part(self.path, files, place, rows, axes)
        return StoredPart(place.stored, tensor, by_rank)

    def _row(self, module: str, like: Row) -> Row:
        """The row of one of the modules that are fused with a row's."""
        if module == like.module:
            return like
        return self.table[module + like.name.removeprefix(like.module)]

    def _check_divides(self, row: Row, scheme: LinearScheme) -> None:
        if scheme.bits == 4 and scheme.activation_dtype is not None:
            raise CheckpointError(
                f"{self.path}: {row.module} is {scheme.full_label} by {self.yaml.name}, and how Golden "
                "Stick stores 4-bit weights beside int8 activations is not read; give the unquantized "
                "checkpoint and quantize it with quant.weight_dtype=int4 quant.activation_dtype=int8."
            )
        cuts = [row.index(rank, len(self.ranks)) for rank in range(len(self.ranks))]
        for dim, what, unit in (
            (1, "input channels", scheme.group_size or 1),
            (0, "output channels", scheme.values_per_byte),
        ):
            lengths = {cut[dim].stop - cut[dim].start for cut in cuts}
            if any(length % unit for length in lengths):
                raise CheckpointError(
                    f"{self.path}: the {what} of {row.module} on a rank must be a multiple of {unit} "
                    f"to be {scheme.full_label} as {self.yaml.name} says, but are {max(lengths)}; use "
                    "the YAML that the checkpoint was quantized with."
                )
