"""4-bit weights and grouped scales on ranks: the same integers, bytes and text at every size."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from launcher.resolve import DEMO
from parallel.checkpoint.layout import SCALE_SUFFIX
from parallel.checkpoint.open import open_checkpoint
from parallel.checkpoint.readers.prepared import PreparedSource
from parallel.errors import CheckpointError
from quant.kernels.reference import GroupedReferenceWeight
from quant.methods.rtn import round_to_nearest
from quant.numeric import pack_int4
from quant.scheme import QuantScheme
from tests.checkpoints import write_checkpoint
from tests.models import generate, load, logits, run_ranks
from tests.test_prepared import checksums, merged, prepare

SCHEMES = {
    "w4 g32": {"weight_dtype": "int4", "group_size": 32},
    "w4 g64": {"weight_dtype": "int4", "group_size": 64},
    "w4 g128": {"weight_dtype": "int4", "group_size": 128},
    "w4": {"weight_dtype": "int4"},
    "w8": {"weight_dtype": "int8"},
    "w8 g32": {"weight_dtype": "int8", "group_size": 32},
    "w4a8 g32": {"weight_dtype": "int4", "group_size": 32, "activation_dtype": "int8"},
    "w4a8": {"weight_dtype": "int4", "activation_dtype": "int8"},
}
SIZES = (1, 2, 4)
IDS = [1, *((37 * place) % 500 for place in range(1, 40))]


def make_scheme(name):
    fields = SCHEMES[name]
    if "group_size" in fields:
        fields = {**fields, "weight_quant_granularity": "per_group"}
    return QuantScheme(quant_method="rtn", modules_to_not_convert=(), **fields)


@pytest.fixture(scope="module", params=["demo", "odd"])
def source(request, tmp_path_factory):
    """The demo model; and one whose FFN (401) is of no whole groups or bytes, and whose heads (24
    channels) begin inside a group and end in the next."""
    if request.param == "demo":
        return DEMO
    folder = tmp_path_factory.mktemp("odd")
    return write_checkpoint(folder / "source", intermediate_size=401, head_dim=24)


@pytest.fixture(scope="module", params=SCHEMES)
def prepared(request, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    scheme = make_scheme(request.param)
    return {size: prepare(source, folder / f"tp{size}", size, scheme) for size in SIZES}


def test_integers_and_scales_are_the_same_at_every_size(prepared):
    expected = merged(prepared[1])
    for size in SIZES[1:]:
        found = merged(prepared[size])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_integers_are_those_of_the_whole_weight(source, prepared):
    weights = load_file(source / "model.safetensors")
    scheme = PreparedSource(prepared[4]).scheme
    tensors = merged(prepared[4])
    for name, linear_scheme in open_checkpoint(source).layout(scheme).schemes.items():
        weight = weights.get(name, weights["model.embed_tokens.weight"])
        expected = round_to_nearest(weight, linear_scheme)
        packed = pack_int4(expected.values_NK) if expected.bits == 4 else expected.values_NK
        assert torch.equal(tensors[name], packed)
        assert torch.equal(tensors[name + SCALE_SUFFIX], expected.scale_NG)


@pytest.mark.parametrize(("size", "other"), [(1, 4), (4, 2), (2, 4), (4, 1)])
def test_resharding_gives_the_bytes_of_preparing_the_source(prepared, tmp_path, size, other):
    scheme = PreparedSource(prepared[size]).scheme
    again = prepare(prepared[size], tmp_path / "again", other, scheme)
    assert checksums(again) == checksums(prepared[other])


def test_text_is_the_same_from_every_size_and_on_every_size(source, prepared):
    scheme = PreparedSource(prepared[1]).scheme
    expected = generate(source, [[1]], 1, scheme=scheme, new_tokens=12)
    for size in SIZES[1:]:
        assert generate(source, [[1]], size, scheme=scheme, new_tokens=12) == expected
    for cut_for, size in ((1, 4), (2, 2), (4, 1)):
        assert generate(prepared[cut_for], [[1]], size, new_tokens=12) == expected


def test_plan_counts_the_bytes_of_every_shard(prepared):
    checkpoint = open_checkpoint(prepared[4])
    layout = checkpoint.layout(QuantScheme())
    for rank in range(4):
        tensors = load_file(prepared[4] / f"rank_{rank}/model.safetensors").values()
        assert sum(tensor.nbytes for tensor in tensors) == layout.rank_bytes(rank, 4)


def test_decode_equals_prefill(prepared):
    whole, one_by_one = (logits(prepared[2], IDS, 2, chunk=chunk) for chunk in (512, 1))
    if PreparedSource(prepared[2]).scheme.activation_dtype is None:
        # float32: the sums of attention in another order.
        torch.testing.assert_close(one_by_one, whole, rtol=1e-4, atol=1e-4)
    else:
        # A last bit of attention may tip an activation into the next of 127 steps.
        assert (one_by_one - whole).norm() <= 0.02 * whole.norm()


def test_logits_equal_those_of_the_dequantized_model_in_float64(source, prepared):
    transformers = pytest.importorskip("transformers")
    scheme = PreparedSource(prepared[4]).scheme
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    state = model.state_dict()
    weights = load_file(source / "model.safetensors")
    for name, linear_scheme in open_checkpoint(source).layout(scheme).schemes.items():
        weight = weights.get(name, weights["model.embed_tokens.weight"])
        state[name].copy_(round_to_nearest(weight, linear_scheme).dequantize(torch.float64))
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0, :-1]
    for size in SIZES:
        found = logits(prepared[4], IDS, size).double()
        # float32 over 2 to 4 layers: 5e-7 was seen. int8 activations: 127 steps of a row's largest
        # value in every product; 0.02 was seen.
        limit = 5e-6 if scheme.activation_dtype is None else 0.04
        assert (found - expected).norm() <= limit * expected.norm()


def test_ranks_hold_the_bytes_of_their_shards(source):
    """In memory int4 is as small as on disk: products keep the nibbles and the stored scales."""
    scheme = make_scheme("w4 g32")
    layout = open_checkpoint(source).layout(scheme)

    def held(group):
        decoder = load(open_checkpoint(source), group, scheme)
        product = decoder.layers[0].mlp.down_proj.local_weight
        assert isinstance(product, GroupedReferenceWeight)
        return product.nbytes

    name = "model.layers.0.mlp.down_proj.weight"
    planned = [sum(part.num_bytes(rank, 2) for part in layout.parts[name]) for rank in range(2)]
    assert run_ranks(2, held) == planned


def test_group_that_heads_split_has_its_scale_on_both_ranks(tmp_path):
    source = write_checkpoint(tmp_path / "source", intermediate_size=401)
    path = prepare(source, tmp_path / "out", 4, make_scheme("w4 g32"))
    name = "model.layers.0.self_attn.o_proj.weight_scale"
    first, second = (load_file(path / f"rank_{rank}/model.safetensors")[name] for rank in (0, 1))
    assert first.shape == second.shape == (64, 1)
    assert torch.equal(first, second)


def test_ffn_is_cut_between_groups_at_the_same_neurons(tmp_path):
    source = write_checkpoint(tmp_path / "source", intermediate_size=401)
    layout = open_checkpoint(source).layout(make_scheme("w4 g128"))
    cuts = {}
    for name in ("gate", "up", "down"):
        row = layout.table[f"model.layers.1.mlp.{name}_proj.weight"]
        cuts[name] = [row.index(rank, 2)[1 if name == "down" else 0] for rank in range(2)]
    assert cuts["gate"] == cuts["up"] == cuts["down"] == [slice(0, 256), slice(256, 401)]


@pytest.mark.parametrize("size", [2, 4])
def test_policies_of_each_layer_run_at_every_size(tmp_path, size):
    """A down_proj with a scale a row is cut between bytes, a grouped one between its groups."""
    scheme = replace(
        make_scheme("w4 g64"),
        modules_to_not_convert=("lm_head",),
        layer_policies=(
            {"pattern": "*.0.mlp.down_proj", "weight_quant_granularity": "per_channel"},
            {"pattern": "down_proj", "weight_dtype": "int8"},
            {"pattern": "*.1.self_attn.*", "weight_dtype": None},
        ),
    )  # fmt: skip
    alone = generate(DEMO, [[1]], 1, scheme=scheme)
    assert generate(DEMO, [[1]], size, scheme=scheme) == alone
    path = prepare(DEMO, tmp_path / "out", size, scheme)
    assert PreparedSource(path).scheme == scheme
    assert generate(path, [[1]], 1) == alone


def test_nibbles_of_another_width_are_refused(tmp_path):
    source = write_checkpoint(tmp_path / "source", intermediate_size=401)
    path = prepare(source, tmp_path / "out", 2, make_scheme("w4"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 400}))
    with pytest.raises(CheckpointError, match="asks for"):
        open_checkpoint(path).layout(QuantScheme())


def test_manifest_of_another_group_size_is_refused(tmp_path):
    path = prepare(DEMO, tmp_path / "out", 1, make_scheme("w4 g32"))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["scheme"]["group_size"] = 64
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="weight_scale is"):
        open_checkpoint(path).layout(QuantScheme())
    manifest["scheme"]["group_size"] = None
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(path)
