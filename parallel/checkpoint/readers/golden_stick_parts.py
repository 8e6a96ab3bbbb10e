"""The parts of each quantized linear in Golden Stick's files, found and checked. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.checkpoint.readers.golden_stick_forms import CACHE_FORMS, Form, linear_forms
from parallel.checkpoint.readers.golden_stick_names import (
    BIAS,
    KEY_SCALE,
    VALUE_SCALE,
    WEIGHT,
    parse_name,
)
from parallel.checkpoint.readers.golden_stick_places import Place, check_form, place_part
from parallel.checkpoint.readers.mindformers_files import WeightFiles
from parallel.checkpoint.readers.pieces import PiecedTensor
from parallel.checkpoint.source import FLOAT_DTYPES, TensorInfo
from parallel.errors import CheckpointError
from parallel.model.placements import HEAD, Row, Table
from parallel.placement import Index, Shape
from quant.scheme import LinearScheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StoredPart:
    """One part over all ranks.

    Attributes:
        stored: its name in the files.
        by_rank: what each rank has of it, where all have the whole; else nothing.
    """

    stored: str
    tensor: PiecedTensor
    by_rank: tuple[PiecedTensor, ...] = ()

    @property
    def info(self) -> TensorInfo:
        return self.tensor.info

    def whole(self) -> Tensor:
        return self.tensor.read(whole_index(self.info.shape))

    def replicas(self) -> Iterator[Tensor]:
        """What each rank has, where all have the whole."""
        return (tensor.read(whole_index(self.info.shape)) for tensor in self.by_rank)


@dataclass(frozen=True)
class LinearParts:
    """A quantized linear.

    Attributes:
        module: Hugging Face's name of it.
        shape: of its weight.
        is_row_parallel: whether ranks cut its input channels.
        parts: by kind.
    """

    module: str
    scheme: LinearScheme
    shape: Shape
    is_row_parallel: bool
    parts: Mapping[str, StoredPart]

    def __contains__(self, kind: str) -> bool:
        return kind in self.parts

    def __getitem__(self, kind: str) -> StoredPart:
        return self.parts[kind]

    def read(self, kind: str, index: Index) -> Tensor:
        return self.parts[kind].tensor.read(index)


# The parts of one layer's KV cache by kind.
CacheParts = Mapping[str, StoredPart]


@dataclass(frozen=True)
class Parts:
    """All that the files hold.

    Attributes:
        floats: what is not quantized, by Hugging Face's names.
        linears: by module.
        caches: of each layer, by the attention's module.
    """

    floats: Mapping[str, PiecedTensor]
    linears: Mapping[str, LinearParts]
    caches: Mapping[str, CacheParts]


def whole_index(shape: Shape) -> Index:
    return tuple(slice(0, length) for length in shape)


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
        self.path, self.ranks, self.table, self.schemes, self.yaml = (
            path,
            ranks,
            table,
            schemes,
            yaml,
        )
        self.left = self._parse()

    def find(self) -> Parts:
        self._check_quantized()
        floats: dict[str, PiecedTensor] = {}
        linears: dict[str, LinearParts] = {}
        caches: dict[str, dict[str, StoredPart]] = {}
        for row in self.table.values():
            scheme = self.schemes.get(row.module) if row.is_linear else None
            if row.is_kv_scale:
                if row.module not in caches:  # its values have a row of their own
                    caches[row.module] = self._take(row, CACHE_FORMS)
            elif scheme is None:
                floats[row.name] = self._take_float(row).tensor
            else:
                linears[row.module] = self._take_linear(row, scheme)
        self._check_nothing_is_left()
        return Parts(floats, linears, caches)

    def _parse(self) -> dict[tuple[str, str], Place]:
        """Module and kind -> where it stands."""
        found: dict[tuple[str, str], Place] = {}
        for name in self._names():
            part = parse_name(name)
            if part is None:
                raise CheckpointError(
                    f"{self.path} holds {name}, which is neither MindFormers' nor a part of a linear "
                    "quantized by Golden Stick that is read; save the network's parameters alone."
                )
            for at, module in enumerate(part.modules):
                twin = found.get((module, part.kind))
                if twin is not None:
                    raise CheckpointError(
                        f"{self.path} holds the {part.kind} of {module} as {twin.stored} and as {name}; "
                        "keep the files of one checkpoint alone."
                    )
                found[module, part.kind] = Place(name, part.modules, at)
        return found

    def _names(self) -> list[str]:
        """What every rank holds."""
        first, *others = self.ranks
        for rank in others:
            differing = sorted(rank.places.keys() ^ first.places.keys())
            if differing:
                lacking = rank if differing[0] in first.places else first
                raise CheckpointError(
                    f"{lacking.path} must hold the tensors of the other ranks, but lacks "
                    f"{differing[0]}; copy all ranks' files of one checkpoint."
                )
        return list(first.places)

    def _take_linear(self, row: Row, scheme: LinearScheme) -> LinearParts:
        self._check_divides(row, scheme)
        kinds = {kind for module, kind in self.left if module == row.module}
        has_bias = f"{row.module}.bias" in self.table
        forms = linear_forms(scheme, kinds, has_bias=has_bias)
        dim = getattr(row.placement, "dim", None)
        parts = self._take(row, forms, f", {scheme.full_label}")
        return LinearParts(row.module, scheme, row.shape, dim == 1, parts)

    def _take(self, row: Row, forms: Mapping[str, Form], label: str = "") -> dict[str, StoredPart]:
        parts: dict[str, StoredPart] = {}
        for kind, form in forms.items():
            place = self.left.pop((row.module, kind), None)
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
        place = self.left.pop((row.module, kind), None)
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

    def _check_quantized(self) -> None:
        """A YAML beside weights that nobody has quantized yet."""
        if any(kind not in (WEIGHT, BIAS) for _, kind in self.left):
            return
        first = self.ranks[0].places
        stored = (self.left[key].stored for key in self.left)
        if all(first[name].tensors[name].dtype in FLOAT_DTYPES for name in stored):
            raise CheckpointError(
                f"{self.path}: {self.yaml.name} says quantization_config, but no tensor of the files is "
                "quantized; take the block out of it, and quantize with quant=rtn_a16w8 or its like."
            )

    def _check_nothing_is_left(self) -> None:
        head = HEAD.removesuffix(".weight")
        if HEAD not in self.table:
            self.left.pop((head, WEIGHT), None)  # tied: as in transformers, the embedding is used
        for (module, kind), place in self.left.items():
            if kind in (KEY_SCALE, VALUE_SCALE):
                why = "says no kvcache_dtype with a scale per channel"
            elif self.schemes.get(module, 0) is None:
                why = f"leaves {module} unquantized"
            elif module in self.schemes:
                why = "says a scheme without such a part"
            else:
                why = "says a model without it"
            raise CheckpointError(
                f"{self.path} holds {place.stored} ({kind}), but {self.yaml.name} {why}; use the YAML "
                "that the checkpoint was quantized with."
            )
