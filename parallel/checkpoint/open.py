"""Open a checkpoint directory of any known form and check it against its config. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parallel.checkpoint.compressed.config import (
    CompressedLinear,
    is_compressed,
    without_quantization,
)
from parallel.checkpoint.compressed.groups import read_quantization, to_scheme
from parallel.checkpoint.compressed.parts import part_names
from parallel.checkpoint.config_values import config_file, read_config_values, says_model
from parallel.checkpoint.generation_config import GENERATION_CONFIG, read_generation_defaults
from parallel.checkpoint.layout import Layout, make_layout
from parallel.checkpoint.layout_checks import check_names
from parallel.checkpoint.mindformers.directory import ModelFile
from parallel.checkpoint.readers.compressed import CompressedSource
from parallel.checkpoint.readers.golden_stick.source import GoldenStickSource, check_unquantized
from parallel.checkpoint.readers.golden_stick.statement import (
    find_quantization,
    find_statement,
    wished_scheme,
)
from parallel.checkpoint.readers.huggingface import (
    HuggingFaceSource,
    find_files,
    find_index,
    model_names,
    names_weights,
    read_index,
)
from parallel.checkpoint.readers.loose_shards import LooseShards, find_shards, shards_size
from parallel.checkpoint.readers.meta.source import MetaSource, is_meta
from parallel.checkpoint.readers.mindformers.files import is_mindformers
from parallel.checkpoint.readers.mindformers.names import by_hf_names
from parallel.checkpoint.readers.mindformers.source import MindFormersSource
from parallel.checkpoint.readers.prepared import PreparedSource, is_prepared, prepared_size
from parallel.checkpoint.readers.random import RandomSource
from parallel.checkpoint.readers.sharded import ShardedSource
from parallel.checkpoint.regular_file import check_directory
from parallel.checkpoint.source import FLOAT_DTYPES, Source
from parallel.checkpoint.source_layout import (
    difference,
    only_scheme,
    prepared_layout,
    source_layout,
)
from parallel.checkpoint.tied_head import KEPT_APART, has_own_head
from parallel.errors import CheckpointError
from parallel.model.config import ModelConfig, said_dtype
from parallel.model.placements import EMBEDDING, linear_modules, placement_table
from quant.scheme import QuantScheme

_ADAPTER_CONFIG = "adapter_config.json"
# Of a second lm_head, which `plan` looks at: one that is not the embedding differs in its first.
_PLANNED_ROWS = 64


@dataclass(frozen=True)
class Checkpoint:
    """A directory that was opened.

    Attributes:
        config: its model, as config.json and the tensors say it.
        source: its tensors.
        eos_token_ids: those of generation_config.json, else of config.json.
        unused_sampling: what its defaults of generation would change of the text; they are not used.
        sampling_file: which file says so.
        notes: what the user should know of how it was read.
    """

    path: Path
    config: ModelConfig
    source: Source
    eos_token_ids: tuple[int, ...]
    unused_sampling: Mapping[str, Any]
    sampling_file: str = GENERATION_CONFIG
    notes: tuple[str, ...] = ()

    @property
    def prepared_size(self) -> int | None:
        """The tensor-parallel size it was prepared for, or None."""
        return self.source.size if isinstance(self.source, ShardedSource) else None

    @property
    def own_scheme(self) -> QuantScheme | None:
        """The scheme that its files bring, which no other can stand in for; None: they bring none."""
        if isinstance(self.source, ShardedSource | CompressedSource | GoldenStickSource):
            return self.source.scheme
        return None

    def layout(self, scheme: QuantScheme, *, vocab_emb_dp: bool = False) -> Layout:
        """What the ranks will hold.

        Raises:
            CheckpointError: tensors do not fit the config, or the checkpoint is quantized already
                and another scheme is asked for.
        """
        return source_layout(self.config, self.source, scheme, vocab_emb_dp=vocab_emb_dp)


def open_checkpoint(
    path: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    key: str = "checkpoint",
    scheme: QuantScheme | None = None,
) -> Checkpoint:
    """Open a directory of Hugging Face's, of Meta's, of MindFormers', or one that `prepare` wrote.

    Args:
        overrides: values that stand in for those of config.json, by its names.
        key: what the user named the directory by.
        scheme: what is asked for; Golden Stick's files are read by it where no YAML is beside them.

    Raises:
        CheckpointError, ModelError: what is wrong with it, in a sentence.
    """
    check_directory(path, key)
    values = read_config(path, overrides)
    config = _model_config(values, path)
    source = _open_source(path, config, values, scheme)
    config, notes = _settled(config, values, source)
    generation = read_generation_defaults(path, values, config.eos_token_ids)
    return Checkpoint(
        path=path,
        config=config,
        source=source,
        eos_token_ids=generation.eos_token_ids,
        unused_sampling=generation.changes,
        sampling_file=generation.file,
        notes=(*notes, *_adapter_notes(path), *generation.notes),
    )


def open_random(values: Mapping[str, Any], scheme: QuantScheme, seed: int) -> Checkpoint:
    """A checkpoint without files: the shape that `values` describe, by the names of config.json.

    Raises:
        ModelError, QuantError: a value that is missing or impossible, in a sentence.
    """
    config = ModelConfig.from_hf(values, "`model`")
    source = RandomSource(make_layout(config, scheme), seed)
    return Checkpoint(source.path, config, source, config.eos_token_ids, unused_sampling={})


def read_config(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`config.json` of a directory, with overrides; the weights are not looked at.

    Where there is none, it is what Meta's params.json or MindFormers' YAML says in other words, with
    what the headers of Meta's files say; or, without any of them, the overrides alone.
    """
    check_directory(path, "checkpoint")
    return read_config_values(path, overrides)


def scheme_to_apply(path: Path) -> ModelFile | None:
    """The YAML beside float weights that says how to quantize them; None: nothing says so.

    Raises:
        CheckpointError: the YAML, or a header of the weights, cannot be read.
    """
    if is_prepared(path) or find_shards(path) or is_meta(path):
        return None
    return wished_scheme(path)


def describe_layout(
    path: Path,
    scheme: QuantScheme,
    overrides: Mapping[str, Any],
    *,
    vocab_emb_dp: bool,
    on_note: Callable[[str], object] = lambda _: None,
) -> Layout:
    """The layout of a directory from its config.json and, where there is one, its index alone.

    What those leave open is looked up in the weights, where all of them are there: a dtype in their
    headers, a second lm_head in its first rows.

    Args:
        on_note: told what the user should know.
    """
    values = read_config(path, overrides)
    config = _model_config(values, path)
    if (sharded := _open_sharded(path, config)) is not None:
        config, _ = _settled(config, values, sharded)
        return prepared_layout(config, sharded, scheme, vocab_emb_dp=vocab_emb_dp)
    is_open = config.tie_word_embeddings or said_dtype(values) is None
    if is_open and names_weights(path) and all(file.exists() for file in find_files(path)):
        source = _open_source(path, config, values, scheme)
        config, notes = _settled(config, values, source, most_rows=_PLANNED_ROWS)
        for note in notes:
            on_note(note)
    said = find_quantization(path, scheme)
    if said is not None and said.scheme is not None:
        own = only_scheme(path, said.scheme, scheme, said.path.name)
        # Golden Stick's files have a zero point for every static input.
        return make_layout(config, own, vocab_emb_dp=vocab_emb_dp, has_zero_point=lambda _: True)
    linears: Mapping[str, CompressedLinear | None] = {}
    if is_compressed(values):
        linears = _compressed_linears(path, config, values)
        scheme = only_scheme(path, to_scheme(linears), scheme)
    asymmetric = {name for name, linear in linears.items() if linear and linear.is_asymmetric}
    layout = make_layout(
        config,
        scheme,
        vocab_emb_dp=vocab_emb_dp,
        has_zero_point=lambda row: row.module in asymmetric,
    )
    if (index := find_index(path)) is not None:
        stored = by_hf_names(read_index(index))
        present = set(model_names(stored, is_tied=config.tie_word_embeddings))
        check_names(_file_names(layout, linears, present), present, str(index))
    return layout


def _model_config(values: dict[str, Any], path: Path) -> ModelConfig:
    """What is said of quantization is for another to read, unless nobody does."""
    own = values if is_prepared(path) else without_quantization(values)
    return ModelConfig.from_hf(own, str(config_file(path)) if says_model(path) else "`model`")


def _settled(
    config: ModelConfig, values: Mapping[str, Any], source: Source, *, most_rows: int | None = None
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The config with what the tensors say of it, and what to say of that.

    Args:
        most_rows: how many rows of a second lm_head are looked at; None: all.
    """
    embedding = source.tensors.get(EMBEDDING)
    if said_dtype(values) is None and embedding is not None and embedding.dtype in FLOAT_DTYPES:
        config = replace(config, dtype=embedding.dtype)
    if isinstance(source, ShardedSource) or not has_own_head(config, source, most_rows=most_rows):
        return config, ()
    return replace(config, tie_word_embeddings=False), (KEPT_APART,)


def _adapter_notes(path: Path) -> tuple[str, ...]:
    """transformers applies it where peft is installed."""
    if not (path / _ADAPTER_CONFIG).exists():
        return ()
    return (
        f"the adapter beside the weights ({_ADAPTER_CONFIG}) is not applied; merge it into them where "
        "it is wanted",
    )


def _open_source(
    path: Path, config: ModelConfig, values: dict[str, Any], scheme: QuantScheme | None
) -> Source:
    if (sharded := _open_sharded(path, config)) is not None:
        return sharded
    if is_meta(path):
        return MetaSource(path, config)
    if (said := find_quantization(path, scheme)) is not None:
        return GoldenStickSource(path, config, said)
    if not is_compressed(values) and is_mindformers(path):
        source = MindFormersSource(path, config)
        check_unquantized(path, source.tensors)
        return source
    if not is_compressed(values):
        return HuggingFaceSource(path, is_tied=config.tie_word_embeddings)
    linears = _compressed_linears(path, config, values)
    rows = placement_table(config, own_head=True).values()
    shapes = {row.module: row.shape for row in rows if row.is_linear}
    return CompressedSource(path, linears, shapes, is_tied=config.tie_word_embeddings)


def _open_sharded(path: Path, config: ModelConfig) -> ShardedSource | None:
    """What `prepare` wrote: a directory of its own, or shards that were copied to another."""
    if is_prepared(path):
        return PreparedSource(path)
    if not (files := find_shards(path)):
        return None
    source = LooseShards(path, files, config)
    said = find_statement(path)
    if said is not None and said.scheme is not None and said.scheme != source.scheme:
        raise CheckpointError(
            f"{path} holds shards that were prepared as {source.scheme.label}, but {said.path.name} "
            f"says {said.scheme.label} ({difference(source.scheme, said.scheme)}); use the YAML of "
            "their scheme."
        )
    return source


def own_size(path: Path) -> int | None:
    """The tensor-parallel size of what `prepare` wrote, with its manifest or copied without; None: it
    is another's."""
    if is_prepared(path):
        return prepared_size(path)
    files = find_shards(path)
    return shards_size(files) if files else None


def _compressed_linears(
    path: Path, config: ModelConfig, values: dict[str, Any]
) -> dict[str, CompressedLinear | None]:
    return read_quantization(values, linear_modules(config), str(path / "config.json"))


def _file_names(
    layout: Layout, linears: Mapping[str, CompressedLinear | None], present: Container[str]
) -> set[str]:
    """What an index must list."""
    names: set[str] = set()
    for row in layout.table.values():
        linear = linears.get(row.module) if row.is_linear else None
        names |= set(part_names(row.name, linear, present)) if linear else {row.twin or row.name}
    return names
