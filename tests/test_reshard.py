"""Resharding: preparing a prepared directory gives the bytes of preparing its source, at every size.

24 query heads can be dealt out to 3 ranks as well as to 8. Their 96 columns of o_proj are three groups
of 32, which 8 ranks of 12 columns cut; 9 groups of FFN and 101 token ids do not divide by 2, 4 or 8.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.checkpoint.export import write_export
from parallel.checkpoint.open import open_checkpoint
from parallel.checkpoint.readers.prepared import PreparedSource
from parallel.checkpoint.store import write_prepared
from parallel.errors import ModelError
from quant.scheme import QuantScheme
from tests.checkpoints import write_checkpoint
from tests.models import RTN
from tests.test_prepared import checksums, prepare

WALK = (1, 2, 4, 8, 3, 1)
INT4 = replace(RTN, weight_dtype="int4")
GROUPED = replace(INT4, weight_quant_granularity="per_group", group_size=32)
MIXED = replace(
    GROUPED,
    layer_policies=(
        {"pattern": "*.mlp.down_proj", "weight_dtype": "int8", "weight_quant_granularity":
         "per_channel", "group_size": None},
        {"pattern": "*.0.self_attn.*", "weight_dtype": None},
    ),
)  # fmt: skip
SCHEMES = {
    "unquantized": QuantScheme(),
    "int8": RTN,
    "int8 with its head": replace(RTN, modules_to_not_convert=()),
    "int4": INT4,
    "int4 g32": GROUPED,
    "int4 g32 and others": MIXED,
}
MODELS = {
    "as many kv heads": {"num_key_value_heads": 24},
    "one kv head on every rank": {"num_key_value_heads": 1},
    "tied": {"num_key_value_heads": 24, "tie_word_embeddings": True},
    "biases": {"num_key_value_heads": 24, "attention_bias": True, "mlp_bias": True},
}


WALKS = [
    ("as many kv heads", "unquantized"),
    ("as many kv heads", "int8"),
    ("as many kv heads", "int4"),
    ("as many kv heads", "int4 g32"),
    ("one kv head on every rank", "int4 g32"),
    ("tied", "int8 with its head"),
    ("biases", "int4 g32 and others"),
]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """It takes most of the time, and these tests ask for bytes."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        name: write_checkpoint(
            folder / name.replace(" ", "_"), num_files=2, num_hidden_layers=1, vocab_size=101,
            hidden_size=64, intermediate_size=288, num_attention_heads=24, head_dim=4, **values,
        )
        for name, values in MODELS.items()
    }  # fmt: skip


@pytest.fixture
def source(sources) -> Path:
    return sources["as many kv heads"]


def reshard(path: Path, output: Path, size: int) -> Path:
    """By what the directory itself says; the source is not given."""
    return prepare(path, output, size, QuantScheme())


def export(path: Path, output: Path) -> dict[str, str]:
    checkpoint = open_checkpoint(path)
    layout = checkpoint.layout(QuantScheme())
    write_export(layout, checkpoint.source, output, max_shard_bytes=1 << 20)
    return checksums(output)


@pytest.mark.parametrize(("model", "scheme"), WALKS)
def test_walk_through_the_sizes_gives_what_preparing_the_source_gives(
    sources, tmp_path, model, scheme
):
    source, scheme = sources[model], SCHEMES[scheme]
    at = prepare(source, tmp_path / "start", WALK[0], scheme)
    start = checksums(at)
    exported = export(at, tmp_path / "exported")
    for step, size in enumerate(WALK[1:]):
        at = reshard(at, tmp_path / f"step_{step}", size)
        direct = start
        if size != 1:
            direct = checksums(prepare(source, tmp_path / f"direct_{size}", size, scheme))
        # Every file of it: the shards, and the manifest with the sums and the source's identity.
        assert checksums(at) == direct, size
    assert checksums(at) == start
    assert export(at, tmp_path / "exported_again") == exported


def test_identity_of_the_source_goes_with_the_shards(source, tmp_path):
    first = prepare(source, tmp_path / "first", 2)
    second = reshard(first, tmp_path / "second", 8)
    identities = [
        json.loads((path / "manifest.json").read_text())["source"] for path in (first, second)
    ]
    assert identities[0] == identities[1]
    files = {file.name for file in source.glob("*.safetensors")}
    assert identities[0]["files"].keys() == files
    assert len(files) == 2


def test_groups_are_really_cut_by_the_heads_of_a_rank(source, tmp_path):
    """What the walk is about: a scale that two ranks hold, and integers that one does."""
    path = prepare(source, tmp_path / "out", 8, GROUPED)
    name = "model.layers.0.self_attn.o_proj.weight"
    prepared = PreparedSource(path)
    scales = [index[1] for index in prepared.slices(name + "_scale")]
    assert sum(cut.stop - cut.start for cut in scales) > prepared.tensors[name + "_scale"].shape[1]
    values = [index[1] for index in prepared.slices(name)]
    assert sum(cut.stop - cut.start for cut in values) == prepared.tensors[name].shape[1]


def test_embedding_that_is_whole_on_every_rank_is_cut_again(source, tmp_path):
    whole = prepare(source, tmp_path / "whole", 3, vocab_emb_dp=True)
    again = reshard(whole, tmp_path / "again", 4)
    assert checksums(again) == checksums(prepare(source, tmp_path / "direct", 4))


def test_size_that_does_not_divide_the_heads_is_refused(source, tmp_path):
    checkpoint = open_checkpoint(prepare(source, tmp_path / "start", 2))
    layout = checkpoint.layout(QuantScheme())
    with pytest.raises(ModelError, match="but is 5; valid sizes: 1, 2, 3, 4, 6, 8"):
        layout.check_tp(5)


def test_listener_of_a_reshard_is_told_each_source_byte_once(source, tmp_path):
    checkpoint = open_checkpoint(prepare(source, tmp_path / "start", 2, QuantScheme()))
    layout = checkpoint.layout(QuantScheme())
    told: list[int] = []
    write_prepared(layout, checkpoint.source, 4, tmp_path / "out", on_bytes=told.append)
    assert sum(told) == layout.rank_bytes(0, 1)
