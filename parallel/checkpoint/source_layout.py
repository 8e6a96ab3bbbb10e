"""What the ranks will hold of a source, by what its files decide already: dtypes, a scheme, zero points.

A source that was quantized brings its scheme; one that was prepared must be just what `prepare` cuts.
"""

from __future__ import annotations

from pathlib import Path

from parallel.checkpoint.layout import SCALE_SUFFIX, Layout, input_zero_point_name, make_layout
from parallel.checkpoint.layout_checks import check_calibrated, check_source
from parallel.checkpoint.readers.compressed import CompressedSource
from parallel.checkpoint.readers.golden_stick.source import GoldenStickSource
from parallel.checkpoint.readers.prepared import MANIFEST
from parallel.checkpoint.readers.random import RandomSource
from parallel.checkpoint.readers.sharded import ShardedSource
from parallel.checkpoint.source import Source
from parallel.errors import CheckpointError
from parallel.model.config import ModelConfig
from parallel.model.placements import Row
from quant.scheme import QuantScheme


def source_layout(
    config: ModelConfig, source: Source, scheme: QuantScheme, *, vocab_emb_dp: bool
) -> Layout:
    """The layout of an opened source, which is checked against it.

    Raises:
        CheckpointError: tensors do not fit the config, or the source is quantized already and another
            scheme is asked for.
    """
    if isinstance(source, ShardedSource):
        return prepared_layout(config, source, scheme, vocab_emb_dp=vocab_emb_dp)
    if isinstance(source, RandomSource):
        assert scheme == source.scheme, "random weights are made for one scheme"
        return make_layout(config, scheme, vocab_emb_dp=vocab_emb_dp)
    if isinstance(source, CompressedSource | GoldenStickSource):
        return _quantized_layout(config, source, scheme, vocab_emb_dp=vocab_emb_dp)
    return _float_layout(config, source, scheme, vocab_emb_dp=vocab_emb_dp)


def _float_layout(
    config: ModelConfig, source: Source, scheme: QuantScheme, *, vocab_emb_dp: bool
) -> Layout:
    def dtype_of(row: Row) -> str:
        info = source.tensors.get(row.twin or row.name)
        return info.dtype if info else config.dtype

    layout = make_layout(config, scheme, vocab_emb_dp=vocab_emb_dp, dtype_of=dtype_of)
    check_source(layout.table, source.tensors, str(source.path))
    return layout


def prepared_layout(
    config: ModelConfig, source: ShardedSource, scheme: QuantScheme, *, vocab_emb_dp: bool
) -> Layout:
    if scheme.quant_method is not None and scheme != source.scheme:
        raise CheckpointError(
            f"{source.path} was prepared as {source.scheme.label}, but `quant` asks for {scheme.label} "
            f"({difference(source.scheme, scheme)}); leave `quant` out, or prepare it from its source "
            "with the scheme that you want."
        )
    stored = _layout_of(config, source, source.scheme, vocab_emb_dp=source.vocab_emb_dp)
    check_calibrated(stored, source.tensors, str(source.path))
    _check_prepared(stored, source)
    return _layout_of(config, source, source.scheme, vocab_emb_dp=vocab_emb_dp)


def difference(own: QuantScheme, asked: QuantScheme) -> str:
    """The first field in which two schemes differ, with its two values: `group_size 64, not 128`."""
    mine, others = own.to_dict(), asked.to_dict()
    key = next(key for key, value in mine.items() if value != others[key])
    return f"{key} {mine[key]!r}, not {others[key]!r}"


def _check_prepared(layout: Layout, source: ShardedSource) -> None:
    """The shards must be exactly those that `prepare` cuts for this config.json."""
    wanted = {tensor.name: (tensor.shape, tensor.dtype) for tensor in layout.tensors}
    found = {name: (info.shape, info.dtype) for name, info in source.tensors.items()}
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{source.path}: {name} is {found.get(name, 'missing')}, but its config.json "
                f"asks for {wanted.get(name, 'no such tensor')}; prepare the checkpoint again."
            )
    for tensor in layout.tensors:
        cuts = [tensor.index(rank, source.size) for rank in range(source.size)]
        if cuts != source.slices(tensor.name):
            raise CheckpointError(
                f"{source.path / MANIFEST}: the slices of {tensor.name} are not those of tp="
                f"{source.size}; prepare the checkpoint again."
            )


def only_scheme(
    path: Path, own: QuantScheme, asked: QuantScheme, said_by: str = "config.json"
) -> QuantScheme:
    """That of a directory that is quantized already, of which there is no other."""
    if asked.quant_method is not None and asked != own:
        raise CheckpointError(
            f"{path} is quantized already, as {own.label} by its {said_by}, and `quant` asks "
            f"for {asked.label}{' in other words' if asked.label == own.label else ''}; leave `quant` "
            "out, or give the unquantized checkpoint."
        )
    return own


def _quantized_layout(
    config: ModelConfig,
    source: CompressedSource | GoldenStickSource,
    scheme: QuantScheme,
    *,
    vocab_emb_dp: bool,
) -> Layout:
    said_by = source.said_by if isinstance(source, GoldenStickSource) else "config.json"
    own = only_scheme(source.path, source.scheme, scheme, said_by)
    layout = _layout_of(config, source, own, vocab_emb_dp=vocab_emb_dp)
    floats = {name: row for name, row in layout.table.items() if name not in layout.schemes}
    plain = {name: at for name, at in source.tensors.items() if name not in source.quantized}
    check_source(floats, plain, str(source.path))
    return layout


def _layout_of(
    config: ModelConfig, source: Source, scheme: QuantScheme, *, vocab_emb_dp: bool
) -> Layout:
    """With the dtypes and the zero points that a quantized source has."""

    def dtype_of(row: Row) -> str:
        info = source.tensors.get(row.name + SCALE_SUFFIX) or source.tensors.get(row.name)
        return info.dtype if info else "missing"

    return make_layout(
        config,
        scheme,
        vocab_emb_dp=vocab_emb_dp,
        dtype_of=dtype_of,
        has_zero_point=lambda row: input_zero_point_name(row) in source.tensors,
    )
