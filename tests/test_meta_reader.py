"""Meta's directories: merged, turned and renamed to what Hugging Face's would hold."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launcher.__main__ import main
from parallel.checkpoint.open import describe_layout, open_checkpoint, read_config
from parallel.checkpoint.readers.meta.source import MetaSource, turn_heads
from parallel.errors import CheckpointError, ModelError
from quant.scheme import QuantScheme
from tests.checkpoints import CONFIG, TOKENIZER_FILES, tensor_shapes, write_checkpoint
from tests.models import RTN, generate, logits
from tests.test_prepared import checksums, prepare
from tests.test_torch_reader import check_slices, imports_torch_to_open

# What the files of tests.checkpoints say, in Meta's words: int(8 * 64 / 3) is 170.
SHAPE = {"num_key_value_heads": 4, "intermediate_size": 176}
PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
WQ, WO = "layers.0.attention.wq.weight", "layers.1.attention.wo.weight"
Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"

# Written down apart from the product's: Hugging Face's name, Meta's, the axis that is cut.
NAMES = {
    "model.embed_tokens": ("tok_embeddings", 1),
    "model.norm": ("norm", None),
    "lm_head": ("output", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
}


def to_meta(name: str) -> tuple[str, int | None]:
    ending = next(key for key in NAMES if name.endswith(key + ".weight"))
    renamed, axis = NAMES[ending]
    prefix = name.removesuffix(ending + ".weight").removeprefix("model.")
    return f"{prefix}{renamed}.weight", axis


def turn_back(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Hugging Face's order of a head's rows to Meta's: half j, entry i becomes pair i, part j."""
    halves = rows.view(-1, 2, head_dim // 2, rows.shape[1])
    return halves.transpose(1, 2).reshape(rows.shape)


def write_consolidated(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    num_files: int,
    *,
    head_dim: int = 16,
    embedding_axis: int = 1,
) -> None:
    """Weights by Hugging Face's names, cut as Meta's training did."""
    for number in range(num_files):
        held = {"rope.freqs": torch.ones(head_dim // 2)}
        for name, tensor in weights.items():
            renamed, axis = to_meta(name)
            axis = embedding_axis if renamed.startswith("tok_") else axis
            turned = (
                turn_back(tensor, head_dim) if ".wq." in renamed or ".wk." in renamed else tensor
            )
            held[renamed] = (
                turned if axis is None else turned.chunk(num_files, axis)[number].clone()
            )
        torch.save(held, path / f"consolidated.{number:02}.pth")


def write_meta(
    path: Path, plain: Path, num_files: int, params: Mapping[str, object] = PARAMS, **how
) -> Path:
    """The directory of Hugging Face's files as Meta would have written it."""
    path.mkdir(exist_ok=True)
    write_consolidated(path, load_file(plain / "model.safetensors"), num_files, **how)
    (path / "params.json").write_text(json.dumps(params))
    for name in TOKENIZER_FILES:
        shutil.copyfile(plain / name, path / name)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "hf", **SHAPE)


@pytest.fixture(scope="module", params=[1, 2, 4])
def meta(request, plain, tmp_path_factory) -> Path:
    return write_meta(tmp_path_factory.mktemp("meta") / "meta", plain, request.param)


def edited(path: Path, number: int, edit) -> None:
    file = path / f"consolidated.{number:02}.pth"
    weights = torch.load(file, weights_only=True)
    edit(weights)
    torch.save(weights, file)


# ------------------------------------------------------------------------------------ what is read


def test_rows_of_a_head_are_turned_as_transformers_turns_them():
    """`permute` of convert_llama_weights_to_hf.py, on rows that say where they came from."""
    heads, head_dim, columns = 3, 8, 5
    rows = torch.arange(heads * head_dim * columns).view(-1, columns)
    expected = rows.view(heads, head_dim // 2, 2, columns).transpose(1, 2).reshape(-1, columns)
    assert torch.equal(turn_heads(rows, head_dim), expected)
    assert torch.equal(turn_heads(turn_back(rows, head_dim), head_dim), rows)


def test_turned_queries_and_keys_score_as_those_of_meta():
    """Meta's complex rotation of neighbours on its rows, Hugging Face's of halves on ours."""
    torch.manual_seed(0)
    head_dim, width, places = 8, 6, torch.tensor([3.0, 11.0])
    wq, wk, x = torch.randn(head_dim, width), torch.randn(head_dim, width), torch.randn(2, width)
    angles = places[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)

    def meta_turn(rows, place):
        pairs = torch.view_as_complex((rows @ x[place]).view(-1, 2))
        turned = pairs * torch.polar(torch.ones(head_dim // 2), angles[place])
        return torch.view_as_real(turned).flatten()

    def halves_turn(rows, place):
        first, second = (rows @ x[place]).chunk(2)
        cos, sin = angles[place].cos(), angles[place].sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin))

    expected = meta_turn(wq, 0) @ meta_turn(wk, 1)
    found = halves_turn(turn_heads(wq, head_dim), 0) @ halves_turn(turn_heads(wk, head_dim), 1)
    # The same sums of eight products in another order, of numbers of a few units.
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_every_slice_of_every_rank_is_that_of_safetensors(meta, plain):
    check_slices(meta, plain)


def test_any_slice_is_read_also_inside_a_head_and_across_files(meta, plain):
    source, expected = open_checkpoint(meta).source, load_file(plain / "model.safetensors")
    numbers = random.Random(0)
    for name, tensor in expected.items():
        for _ in range(20):
            ends = [sorted(numbers.choices(range(n + 1), k=2)) for n in tensor.shape]
            index = tuple(slice(*pair) for pair in ends)
            found = source.read(name, index)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor[index]), (name, index)


def test_opening_needs_no_torch(plain, tmp_path):
    assert not imports_torch_to_open(write_meta(tmp_path / "meta", plain, 2))


def test_slice_of_whole_heads_touches_no_other_rows(plain, tmp_path):
    source = open_checkpoint(write_meta(tmp_path / "meta", plain, 2)).source
    files = source._files.files
    asked = []
    for number, file in enumerate(files):
        read = file.read
        file.read = lambda name, index, number=number, read=read: (
            asked.append((number, index[0])),
            read(name, index),
        )[1]
    source.read(Q, (slice(16, 32), slice(0, 64)))
    source.read(Q, (slice(33, 40), slice(0, 64)))
    assert asked == [(0, slice(16, 32)), (1, slice(0, 16))]


def test_text_is_that_of_safetensors_at_every_size(meta, plain):
    prompts = [[1, 5, 9], [1, 7]]
    expected = generate(plain, prompts, 1, new_tokens=6)
    for size in (1, 2, 4):
        assert generate(meta, prompts, size, new_tokens=6) == expected


@pytest.mark.parametrize("num_files", [1, 2, 4])
def test_embedding_that_is_cut_along_the_vocabulary_is_told_by_its_shape(
    tmp_path, plain, num_files
):
    check_slices(write_meta(tmp_path / "meta", plain, num_files, embedding_axis=0), plain)


def test_fewer_kv_heads_are_merged_and_turned(tmp_path):
    plain = write_checkpoint(tmp_path / "hf", **{**SHAPE, "num_key_value_heads": 2})
    params = {**PARAMS, "n_kv_heads": 2}
    check_slices(write_meta(tmp_path / "meta", plain, 2, params), plain)


def test_real_model_from_metas_files_writes_its_text(shared, tmp_path):
    from launcher.text import open_tokenizer

    plain = shared / "checkpoints/stories260K/hf"
    params = {**PARAMS, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 4}
    path = write_meta(tmp_path / "meta", plain, 2, params, head_dim=8)
    ids = generate(path, [[1]], 2, new_tokens=40)[0].token_ids
    expected = (plain.parent / "expected_greedy_200.txt").read_text()
    text = open_tokenizer(path).decode([1, *ids])
    assert len(text) > 80
    assert expected.startswith(text)


# -------------------------------------------------------------------------------------- its config


def test_config_is_that_of_hugging_face_but_for_what_meta_does_not_say(meta):
    found, expected = read_config(meta), {**CONFIG, **SHAPE}
    assert found.pop("torch_dtype") == "float32"
    # Two thousand positions of Llama 1, four thousand of Llama 2: the files do not tell.
    assert found.pop("max_position_embeddings") == 4096
    assert found.pop("rope_scaling") is None
    assert found == {key: value for key, value in expected.items() if key in found}


def config_of(tmp_path: Path, vocab: int = 40, hidden: int = 64, **params) -> dict[str, object]:
    """Of a model of one layer that is as wide and has as many words."""
    shapes = {"model.embed_tokens.weight": (vocab, hidden), NORM: (hidden,)}
    shapes |= {"model.layers.0.mlp.gate_proj.weight": (-(-int(8 * hidden / 3) // 16) * 16, hidden)}
    weights = {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in shapes.items()}
    write_consolidated(tmp_path, weights, 1)
    (tmp_path / "params.json").write_text(json.dumps({**PARAMS, "dim": hidden, **params}))
    return read_config(tmp_path)


@pytest.mark.parametrize(
    ("vocab", "params", "context", "factor", "eos"),
    [
        (40, {}, 4096, None, 2),
        (40, {"rope_theta": 1000000.0}, 16384, None, 2),
        (128256, {"rope_theta": 500000.0}, 8192, None, [128001, 128008, 128009]),
        (128256, {"use_scaled_rope": True}, 131072, 8.0, [128001, 128008, 128009]),
        (128256, {"use_scaled_rope": False}, 8192, None, [128001, 128008, 128009]),
    ],
)
def test_version_is_told_by_the_vocabulary_and_the_scaled_rope(
    tmp_path, vocab, params, context, factor, eos
):
    found = config_of(tmp_path, vocab, 16, **params)
    assert found["max_position_embeddings"] == context
    assert found["eos_token_id"] == eos
    assert found["rope_theta"] == params.get("rope_theta", 10000.0)
    assert (found["rope_scaling"] or {}).get("factor") == factor


def test_scaled_rope_has_the_constants_of_llama_3(tmp_path):
    assert config_of(tmp_path, 40, 16, use_scaled_rope=True)["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    narrow = config_of(tmp_path, 4, 2048, use_scaled_rope=True)["rope_scaling"]
    assert narrow["factor"] == 32.0


def test_head_that_is_not_there_is_tied(tmp_path):
    plain = write_checkpoint(tmp_path / "hf", **SHAPE, tie_word_embeddings=True)
    path = write_meta(tmp_path / "meta", plain, 2)
    assert read_config(path)["tie_word_embeddings"]
    assert torch.equal(logits(path, [1, 5, 9, 3], 2), logits(plain, [1, 5, 9, 3], 2))


def test_config_json_beside_the_files_is_used(tmp_path, plain):
    path = write_meta(tmp_path / "meta", plain, 2, {"unknown": "not read"})
    shutil.copyfile(plain / "config.json", path / "config.json")
    assert read_config(path) == read_config(plain)
    check_slices(path, plain)


def test_layout_is_described_without_a_config_json(meta, plain):
    scheme = QuantScheme()
    found = describe_layout(meta, scheme, {}, vocab_emb_dp=False)
    expected = describe_layout(plain, scheme, {}, vocab_emb_dp=False)
    assert [(t.name, t.shape, t.dtype) for t in found.tensors] == [
        (t.name, t.shape, t.dtype) for t in expected.tensors
    ]


def test_prepared_directory_has_a_config_of_its_own(meta, plain, tmp_path):
    found = prepare(meta, tmp_path / "a", 2, RTN)
    assert json.loads((found / "config.json").read_text()) == read_config(meta)
    assert (found / "tokenizer.model").exists()
    expected, sums = checksums(prepare(plain, tmp_path / "b", 2, RTN)), checksums(found)
    shards = [name for name in expected if name.startswith("rank_")]
    assert [sums[name] for name in shards] == [expected[name] for name in shards]
    assert generate(found, [[1, 5]], 2, new_tokens=4) == generate(
        tmp_path / "b", [[1, 5]], 2, new_tokens=4
    )


def test_plan_names_params_json_in_an_error_of_its_values(tmp_path, plain, capsys):
    path = write_meta(tmp_path / "meta", plain, 1, {**PARAMS, "n_heads": 3})
    assert main(["plan", f"checkpoint={path}"]) == 2
    assert "params.json" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- what is refused


def remove(number: int):
    return lambda path: (path / f"consolidated.{number:02}.pth").unlink()


def without(*names: str):
    def damage(path: Path) -> None:
        for number in range(2):
            edited(path, number, lambda held: [held.pop(name) for name in names])

    return damage


def with_params(**values):
    return lambda path: (path / "params.json").write_text(json.dumps({**PARAMS, **values}))


def in_file(number: int, name: str, tensor: torch.Tensor):
    return lambda path: edited(path, number, lambda held: held.update({name: tensor}))


def in_both(name: str, tensor: torch.Tensor):
    def damage(path: Path) -> None:
        for number in range(2):
            edited(path, number, lambda held: held.update({name: tensor}))

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove(0), "consolidated.00.pth is missing"),
        (remove(1), "asks for 176 rows of feed_forward.w1, but the 1 consolidated files add up to 88"),
        (without("norm.weight"), "no norm.weight"),
        (without(WQ), "lacks 1 tensors of the model, first model.layers.0.self_attn.q_proj.weight"),
        (in_file(1, "extra", torch.ones(2)), "'extra' is missing in consolidated.00.pth"),
        (in_both("layers.0.attention.wq.bias", torch.ones(2)), "'layers.0.attention.wq.bias'"),
        (in_both("layers.0.feed_forward.experts.weight", torch.ones(2)), "experts"),
        (in_both("layers.0.attention.wq.weight", torch.ones(2)), "no parts of one tensor"),
        (in_both("layers.2.attention_norm.weight", torch.ones(64)), "not know, first model.layers.2"),
        (in_both(WO, torch.ones(64, 30)), r"add up to \[64, 60\] for model.layers.1.self_attn.o_proj"),
        (in_file(1, WO, torch.ones(60, 32)), "no parts of one"),
        (in_file(1, WO, torch.ones(64, 32).half()), "float16 in"),
        (with_params(vocab_size=4096), "says vocab_size 4096.*2048 rows"),
        (with_params(vocab_size="many"), "vocab_size"),
        (with_params(multiple_of=256), "asks for 256 rows of feed_forward.w1"),
        (with_params(ffn_dim_multiplier=1.3), "rows of feed_forward.w1"),
        (with_params(n_heads=None), "positive integer for n_heads, but says None"),
        (with_params(n_layers=-1), "positive integer for n_layers"),
        (with_params(norm_eps="small"), "positive number for norm_eps"),
        (with_params(use_scaled_rope="yes"), "true or false of use_scaled_rope"),
        (with_params(moe={"num_experts": 8}), "the key 'moe', which is not read"),
        (with_params(n_heads=7), "hidden_size must be a multiple of 7 heads"),
        (with_params(n_kv_heads=2), "for model.layers.0.self_attn.k_proj"),
        (lambda path: (path / "params.json").write_text("[1]"), "JSON object"),
        (lambda path: (path / "params.json").unlink(), "config.json is missing"),
    ],
)  # fmt: skip
def test_files_that_do_not_make_the_model_are_refused(tmp_path, plain, damage, says):
    path = write_meta(tmp_path / "meta", plain, 2)
    damage(path)
    with pytest.raises((CheckpointError, ModelError), match=says):
        open_checkpoint(path).layout(QuantScheme())


def test_missing_file_is_seen_by_the_config_json_beside(tmp_path, plain):
    path = write_meta(tmp_path / "meta", plain, 4)
    shutil.copyfile(plain / "config.json", path / "config.json")
    (path / "consolidated.03.pth").unlink()
    with pytest.raises(CheckpointError, match=r"the 3 consolidated files add up to .*download all"):
        open_checkpoint(path)


def test_files_without_params_json_are_refused(tmp_path, plain):
    path = write_meta(tmp_path / "meta", plain, 2)
    shutil.copyfile(plain / "config.json", path / "config.json")
    (path / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"no params\.json"):
        open_checkpoint(path)


def test_norms_that_differ_between_files_are_refused_when_they_are_read(tmp_path, plain):
    path = write_meta(tmp_path / "meta", plain, 2)
    edited(path, 1, lambda held: held.update({"norm.weight": held["norm.weight"] + 1e-6}))
    source = open_checkpoint(path).source
    with pytest.raises(CheckpointError, match=r"norm\.weight must be the same in every file"):
        source.read(NORM, (slice(0, 64),))


def test_norms_of_nan_are_the_same_in_every_file(tmp_path, plain):
    path = write_meta(tmp_path / "meta", plain, 2)
    in_both("norm.weight", torch.full((64,), torch.nan))(path)
    assert open_checkpoint(path).source.read(NORM, (slice(0, 64),)).isnan().all()


def test_frequencies_are_dropped_by_name(meta):
    source = open_checkpoint(meta).source
    assert isinstance(source, MetaSource)
    assert set(source.tensors) == set(tensor_shapes({**CONFIG, **SHAPE}))


def test_hugging_faces_files_are_read_where_both_are(tmp_path, plain):
    path = write_meta(tmp_path / "both", plain, 2)
    shutil.copyfile(plain / "config.json", path / "config.json")
    shutil.copyfile(plain / "model.safetensors", path / "model.safetensors")
    assert open_checkpoint(path).source.tensors[NORM].file == "model.safetensors"
