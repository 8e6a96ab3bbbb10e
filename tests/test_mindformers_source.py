"""MindFormers' checkpoints by Hugging Face's names: whole, by rank, fused, with a strategy file."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.config import compose
from launcher.resolve import open_job
from parallel.checkpoint.open import describe_layout, open_checkpoint
from parallel.checkpoint.readers.mindformers.files import is_mindformers, weights_directory
from parallel.checkpoint.readers.mindformers.names import (
    hf_modules,
    hf_names,
    is_mindformers_name,
    mindformers_name,
)
from parallel.checkpoint.readers.mindformers.source import MindFormersSource
from parallel.checkpoint.readers.mindformers.strategy import (
    ParameterLayout,
    find_strategy,
    read_strategy,
)
from parallel.checkpoint.readers.mindspore.file import MindSporeFile
from parallel.checkpoint.store import write_prepared
from parallel.errors import CheckpointError
from quant.scheme import QuantScheme
from tests.checkpoints import write_checkpoint, write_weights
from tests.mindspore_checkpoints import (
    field,
    fuse,
    layout_message,
    layouts,
    number,
    rank_weights,
    to_mindformers,
    write_ckpt,
    write_strategy,
)
from tests.models import RTN, generate

NAMES = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "model.layers.3.self_attn.q_proj.weight": "model.layers.3.attention.wq.weight",
    "model.layers.3.self_attn.k_proj.bias": "model.layers.3.attention.wk.bias",
    "model.layers.3.self_attn.v_proj.weight": "model.layers.3.attention.wv.weight",
    "model.layers.13.self_attn.o_proj.weight": "model.layers.13.attention.wo.weight",
    "model.layers.13.mlp.gate_proj.weight": "model.layers.13.feed_forward.w1.weight",
    "model.layers.13.mlp.down_proj.weight": "model.layers.13.feed_forward.w2.weight",
    "model.layers.13.mlp.up_proj.weight": "model.layers.13.feed_forward.w3.weight",
    "model.layers.0.input_layernorm.weight": "model.layers.0.attention_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "model.layers.0.ffn_norm.weight",
    "model.norm.weight": "model.norm_out.weight",
    "lm_head.weight": "lm_head.weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_mapped_both_ways(name):
    assert mindformers_name(name) == NAMES[name]
    assert hf_names(NAMES[name]) == (name,)
    assert is_mindformers_name(NAMES[name]) == (name != "lm_head.weight")
    assert not is_mindformers_name(name)


def test_fused_names_stand_for_several():
    layer = "model.layers.7."
    assert hf_names(layer + "attention.w_qkv.bias") == tuple(
        f"{layer}self_attn.{letter}_proj.bias" for letter in "qkv"
    )
    assert hf_names(layer + "feed_forward.w_gate_hidden.weight") == (
        f"{layer}mlp.gate_proj.weight",
        f"{layer}mlp.up_proj.weight",
    )
    assert hf_modules(layer + "feed_forward.w_gate_hidden") == (
        f"{layer}mlp.gate_proj",
        f"{layer}mlp.up_proj",
    )


@pytest.mark.parametrize(
    "name",
    [
        "adam_m.model.norm_out.weight", "epoch_num", "model.layers.x.attention.wq.weight",
        "model.layers.0.attention.wq.scale", "model.layers.0.attention.wk_v.weight",
        "model.tok_embeddings.weight", "model.layers.0.self_attn.q_proj.weight", "weight", "",
    ],
)  # fmt: skip
def test_unknown_names_stay_unknown(name):
    assert hf_names(name) == ()


# Of the outer modules, what MindFormers leaves whole: by `vocab_emb_dp: True`, the embedding.
EMBEDDING, HEAD = "model.tok_embeddings.embedding_weight", "lm_head.weight"
# Two kv heads of eight rows, so that four ranks share them.
SMALL = {"hidden_size": 32, "intermediate_size": 56, "vocab_size": 48, "num_hidden_layers": 1}


def copy_beside(source: Path, path: Path) -> Path:
    """All of a Hugging Face directory but its weights."""
    path.mkdir(parents=True)
    for file in source.iterdir():
        if "safetensors" not in file.name:
            shutil.copyfile(file, path / file.name)
    return path


def hf_weights(source: Path) -> dict[str, torch.Tensor]:
    files = [load_file(file) for file in sorted(source.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


def num_kv_heads(source: Path) -> int:
    return json.loads((source / "config.json").read_text())["num_key_value_heads"]


def ckpt(source: Path, path: Path, *, fused: bool = False, **how) -> Path:
    """One file of the whole model."""
    weights = to_mindformers(hf_weights(source))
    write_ckpt(path / "llama.ckpt", fuse(weights) if fused else weights, **how)
    return path


def ckpts(source: Path, path: Path) -> Path:
    weights = list(to_mindformers(hf_weights(source)).items())
    for part in range(3):
        write_ckpt(path / f"llama_{part}.ckpt", dict(weights[part::3]))
    return path


def safetensors(source: Path, path: Path, *, num_files: int = 1, fused: bool = False) -> Path:
    weights = to_mindformers(hf_weights(source))
    write_weights(path, fuse(weights) if fused else weights, num_files)
    return path


def ranks(
    source: Path,
    path: Path,
    size: int,
    *,
    fused: bool = False,
    whole: tuple[str, ...] = (EMBEDDING, HEAD),
    devices: list[int] | None = None,
    strategy: str | None = None,
    suffix: str = "ckpt",
) -> Path:
    """A directory for each rank.

    Args:
        devices: the grid of the ranks; its last dimension cuts, the others repeat.
        strategy: where to write the strategy file; None: there is none.
    """
    devices = devices or [size]
    weights, cuts = to_mindformers(hf_weights(source)), devices[-1]
    for rank in range(size):
        held = rank_weights(weights, rank % cuts, cuts, num_kv_heads(source), whole)
        held = fuse(held) if fused else held
        if suffix == "ckpt":
            write_ckpt(path / f"rank_{rank}" / f"checkpoint_{rank}.ckpt", held)
        else:
            (path / f"rank_{rank}").mkdir()
            held = {name: tensor.contiguous() for name, tensor in held.items()}
            save_file(held, path / f"rank_{rank}" / "model.safetensors")
    if strategy:
        names = list(fuse(weights) if fused else weights)
        for name in (strategy, strategy.replace("_0", "_1")):
            write_strategy(path / name, layouts(names, devices, whole))
    return path


STRATEGY = "strategy/ckpt_strategy_rank_0.ckpt"
FORMS = {
    "ckpt": ckpt,
    "ckpt of small chunks with a checksum": partial(ckpt, slice_bytes=1000, crc=True),
    "ckpt, fused": partial(ckpt, fused=True),
    "three ckpts": ckpts,
    "safetensors": safetensors,
    "safetensors with an index": partial(safetensors, num_files=3),
    "safetensors, fused": partial(safetensors, fused=True),
    "one rank": partial(ranks, size=1),
    "two ranks": partial(ranks, size=2),
    "two ranks, fused": partial(ranks, size=2, fused=True),
    "two ranks, embedding and head cut": partial(ranks, size=2, whole=()),
    "two ranks of safetensors": partial(ranks, size=2, suffix="safetensors"),
    "two ranks with a strategy": partial(ranks, size=2, strategy=STRATEGY),
    "two ranks with a strategy, fused": partial(ranks, size=2, strategy=STRATEGY, fused=True),
    "two ranks with a strategy beside": partial(ranks, size=2, strategy="../" + STRATEGY),
    "two ranks with a strategy inside": partial(ranks, size=2, strategy="strategy_0.ckpt"),
    "two ranks with a strategy, embedding cut": partial(
        ranks, size=2, strategy=STRATEGY, whole=(HEAD,)
    ),
    "four ranks": partial(ranks, size=4),
    "four ranks, fused": partial(ranks, size=4, fused=True),
    "four ranks, two of them copies": partial(
        ranks, size=4, devices=[2, 2], strategy=STRATEGY, fused=True
    ),
}


@pytest.fixture(scope="module", params=["llama with biases", "qwen2, bf16"])
def tiny(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "hf"
    if request.param == "llama with biases":
        return write_checkpoint(path, **SMALL, attention_bias=True, mlp_bias=True)
    names = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return write_checkpoint(path, dtype=torch.bfloat16, **SMALL, **names)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_rank_reads_the_same_slices_from_every_form(tiny, tmp_path, form):
    wanted = open_checkpoint(tiny)
    found = open_checkpoint(form(tiny, copy_beside(tiny, tmp_path / "x" / "mindformers")))
    assert isinstance(found.source, MindFormersSource)
    layout = found.layout(QuantScheme())
    assert found.source.tensors.keys() == wanted.source.tensors.keys()
    for size in (1, 2, 4):
        for rank in range(size):
            for row in layout.table.values():
                index = row.index(rank, size)
                tensor = found.source.read(row.name, index)
                assert tensor.is_contiguous()
                assert torch.equal(tensor, wanted.source.read(row.name, index)), row.name


def test_any_block_of_a_joined_tensor_is_read(tmp_path):
    """Rows and columns that begin and end in different ranks' parts."""
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    form = ranks(tiny, copy_beside(tiny, tmp_path / "ranks"), 4, fused=True, whole=())
    source, weights = open_checkpoint(form).source, hf_weights(tiny)
    draw = random.Random(0)
    for _ in range(300):
        name = draw.choice(sorted(weights))
        index = tuple(slice(*sorted(draw.choices(range(n + 1), k=2))) for n in weights[name].shape)
        assert torch.equal(source.read(name, index), weights[name][index])


@pytest.fixture(scope="module")
def story(shared):
    """A trained model, a prompt, and its text."""
    original, prompts = shared / "checkpoints/stories260K/hf", [[1, 403, 407, 261, 378]]
    return original, prompts, generate(original, prompts, 1, new_tokens=12)


@pytest.mark.parametrize("form", ["ckpt", "safetensors, fused", "two ranks with a strategy, fused"])
def test_text_is_that_of_the_hugging_face_checkpoint(story, tmp_path, form):
    original, prompts, wanted = story
    path = FORMS[form](original, copy_beside(original, tmp_path / "x" / "mindformers"))
    for size in (1, 2, 4):
        assert generate(path, prompts, size, new_tokens=12) == wanted
    assert len(wanted[0].token_ids) == 12


def test_a_quantized_prepare_is_that_of_the_hugging_face_checkpoint(tmp_path):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    form = ranks(tiny, copy_beside(tiny, tmp_path / "ranks"), 2, fused=True)
    prepared = {}
    for path in (tiny, form):
        checkpoint = open_checkpoint(path)
        output = tmp_path / f"{path.name}-tp4"
        write_prepared(checkpoint.layout(RTN), checkpoint.source, 4, output)
        prepared[path] = [file.read_bytes() for file in sorted(output.glob("rank_*/*"))]
    assert prepared[tiny] == prepared[form]
    assert len(prepared[form]) == 4


def test_checkpoint_may_be_named_by_its_only_file(tmp_path):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ckpt(tiny, copy_beside(tiny, tmp_path / "one"))
    assert weights_directory(path / "llama.ckpt") == path
    assert weights_directory(path) == path
    assert weights_directory(path / "missing.ckpt") == path / "missing.ckpt"
    assert weights_directory(tiny / "model.safetensors") == tiny
    resolved = open_job(compose([f"checkpoint={path}/llama.ckpt"]))
    assert resolved.path == path
    write_ckpt(path / "llama-2_10.ckpt", {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"only file of weights .* but 1 more are there"):
        weights_directory(path / "llama.ckpt")


def test_safetensors_that_are_called_ckpt_are_read_as_what_they_are(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    named = safetensors(source, copy_beside(source, tmp_path / "named"))
    (file,) = named.glob("*.safetensors")
    file.rename(file.with_suffix(".ckpt"))
    found, wanted = (
        open_checkpoint(path)
        for path in (named, ckpt(source, copy_beside(source, tmp_path / "ckpt")))
    )
    assert found.source.tensors.keys() == wanted.source.tensors.keys()
    assert generate(named, [[1, 5, 9]], 1) == generate(tmp_path / "ckpt", [[1, 5, 9]], 1)


def test_plan_knows_the_names_of_an_index(tmp_path):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = safetensors(tiny, copy_beside(tiny, tmp_path / "mindformers"), num_files=2)
    layout = describe_layout(path, QuantScheme(), {}, vocab_emb_dp=False)
    assert layout.table.keys() == hf_weights(tiny).keys()


def test_opening_needs_no_torch(tmp_path):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ranks(tiny, copy_beside(tiny, tmp_path / "ranks"), 2, strategy="strategy_0.ckpt")
    script = (
        "import sys; from pathlib import Path; from parallel.checkpoint.open import open_checkpoint; "
        "open_checkpoint(Path(sys.argv[1])).source.identity(); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(path)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_identity_tells_ranks_and_strategy_and_no_path(tmp_path):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    identities = []
    for name, how in (
        ("a", {}),
        ("b", {}),
        ("c", {"strategy": STRATEGY}),
        ("d", {"whole": (HEAD,)}),
    ):
        path = ranks(tiny, copy_beside(tiny, tmp_path / name / "ranks"), 2, **how)
        identities.append(open_checkpoint(path).source.identity())
    assert identities[0] == identities[1]
    assert sorted(identities[0]["files"]) == [
        "rank_0/checkpoint_0.ckpt", "rank_1/checkpoint_1.ckpt",
    ]  # fmt: skip
    assert all(identity != identities[0] for identity in identities[2:])
    assert str(tmp_path) not in json.dumps(identities)


def test_sums_are_checked_where_there_are_some(tmp_path):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ckpt(tiny, copy_beside(tiny, tmp_path / "one"), crc=True)
    passed = []
    assert open_checkpoint(path).source.check_sums(passed.append) == ()
    assert sum(passed) == (path / "llama.ckpt").stat().st_size - 17
    data = bytearray((path / "llama.ckpt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "llama.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        open_checkpoint(path).source.check_sums()
    path = ckpt(tiny, copy_beside(tiny, tmp_path / "two"))
    assert open_checkpoint(path).source.check_sums() == ("llama.ckpt",)


def test_sum_in_the_header_of_safetensors_is_checked(tmp_path):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = copy_beside(tiny, tmp_path / "one")
    weights = to_mindformers(hf_weights(tiny))
    weights |= {"scalar": torch.tensor(3.0), "nothing": torch.ones(0)}
    found = 0
    for name in sorted(weights):
        found = zlib.crc32(weights[name].numpy().tobytes(), zlib.crc32(name.encode(), found))
    save_file(weights, path / "model.safetensors", {"format": "ms", "crc_num": str(found)})
    assert open_checkpoint(path).source.check_sums() == ()
    save_file(weights, path / "model.safetensors", {"format": "ms", "crc_num": str(found ^ 1)})
    with pytest.raises(CheckpointError, match="crc_num"):
        open_checkpoint(path).source.check_sums()


def refusal(path: Path) -> str:
    """The one sentence that opening a directory, or reading all of it, ends with."""
    with pytest.raises(CheckpointError) as caught:  # noqa: PT012
        checkpoint = open_checkpoint(path)
        checkpoint.layout(QuantScheme())
        for name, info in checkpoint.source.tensors.items():
            checkpoint.source.read(name, tuple(slice(0, length) for length in info.shape))
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def rewrite(path: Path, edit, suffix: str = "ckpt") -> None:
    """Change the tensors of one file."""
    file = MindSporeFile(path)
    held = {
        name: file.read(name, tuple(slice(0, length) for length in info.shape)).clone()
        for name, info in file.tensors.items()
    }
    edit(held)
    write_ckpt(path, held)


NORM = "model.layers.0.attention_norm.weight"


def add(name, tensor):
    return lambda held: held.update({name: tensor})


EDITS = {
    "lacks model.norm_out.weight": lambda held: held.pop("model.norm_out.weight"),
    "must be float32 [32] as in rank_0, but is float16": add(NORM, torch.ones(32).half()),
    "must be float32 [32] as in rank_0, but is float32 [31]": add(NORM, torch.ones(31)),
    f"must hold the same {NORM}": add(NORM, torch.ones(32)),
    f"must hold the same {EMBEDDING}": lambda held: held[EMBEDDING][-1].add_(1),
}


@pytest.mark.parametrize("message", EDITS)
def test_ranks_that_do_not_fit_each_other_are_refused(tmp_path, message):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ranks(tiny, copy_beside(tiny, tmp_path / "ranks"), 2)
    rewrite(path / "rank_1/checkpoint_1.ckpt", EDITS[message])
    assert message in refusal(path)


def test_large_copies_are_compared_at_their_ends(tmp_path):
    """More would be reading them twice."""
    tiny = write_checkpoint(tmp_path / "hf", **{**SMALL, "vocab_size": 2048})
    path = ranks(tiny, copy_beside(tiny, tmp_path / "ranks"), 2)
    rewrite(path / "rank_1/checkpoint_1.ckpt", lambda held: held[EMBEDDING][1000].add_(1))
    source = open_checkpoint(path).source
    source.read("model.embed_tokens.weight", (slice(0, 2048), slice(0, 32)))
    for rows in (slice(0, 1001), slice(1000, 2048), slice(990, 1010)):
        with pytest.raises(CheckpointError, match="must hold the same"):
            source.read("model.embed_tokens.weight", (rows, slice(0, 32)))


def test_ranks_of_another_number_are_refused(tmp_path):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ranks(tiny, copy_beside(tiny, tmp_path / "ranks"), 4)
    shutil.move(path / "rank_2", tmp_path / "rank_2")
    assert "rank_2 is missing" in refusal(path)
    shutil.rmtree(path / "rank_3")
    assert "must join to [32, 56] by MindFormers' rules" in refusal(path)


def test_swapped_copies_of_kv_heads_are_found(tmp_path):
    """Four ranks share two kv heads: ranks 0 and 1 have the first."""
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ranks(tiny, copy_beside(tiny, tmp_path / "ranks"), 4)
    first, second = (path / f"rank_{n}/checkpoint_{n}.ckpt" for n in (1, 2))
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    assert "must hold the same model.layers.0.attention.wk.weight" in refusal(path)


def test_what_is_not_one_checkpoint_is_refused(tmp_path):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ckpt(tiny, copy_beside(tiny, tmp_path / "twice"))
    shutil.copyfile(path / "llama.ckpt", path / "llama-2_10.ckpt")
    assert "is in llama-2_10.ckpt and in llama.ckpt" in refusal(path)
    path = ckpt(tiny, copy_beside(tiny, tmp_path / "kinds"))
    safetensors(tiny, path)
    assert "one of the two kinds" in refusal(path)
    path = ranks(tiny, ckpt(tiny, copy_beside(tiny, tmp_path / "both")), 2)
    assert "holds llama.ckpt and rank_0" in refusal(path)
    path = ranks(tiny, copy_beside(tiny, tmp_path / "ranks"), 2)
    shutil.copyfile(path / "rank_1/checkpoint_1.ckpt", path / "rank_1/step_20.ckpt")
    assert "holds 2 (checkpoint_1.ckpt, step_20.ckpt)" in refusal(path)


@pytest.mark.parametrize("name", ["epoch_num", "adam_m.model.norm_out.weight"])
def test_what_is_no_weight_is_refused_by_name(tmp_path, name):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ckpt(tiny, copy_beside(tiny, tmp_path / "one"))
    rewrite(path / "llama.ckpt", add(name, torch.tensor(3.0)))
    assert f"first {name}" in refusal(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_weight_of_another_dtype_is_refused(tmp_path, dtype):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ckpt(tiny, copy_beside(tiny, tmp_path / "one"))
    rewrite(path / "llama.ckpt", add("model.norm_out.weight", torch.ones(32, dtype=dtype)))
    assert f"model.norm.weight is {str(dtype)[6:]}" in refusal(path)


def test_fused_and_unfused_together_are_refused(tmp_path):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ckpt(tiny, copy_beside(tiny, tmp_path / "one"), fused=True)
    rewrite(path / "llama.ckpt", add("model.layers.0.attention.wk.weight", torch.ones(16, 32)))
    assert "twice" in refusal(path)


@pytest.mark.parametrize("shape", [(63, 32), (65, 32), (64,), (64, 32, 1), (16, 32)])
def test_fused_weight_of_another_shape_is_refused(tmp_path, shape):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ckpt(tiny, copy_beside(tiny, tmp_path / "one"), fused=True)
    name = "model.layers.0.attention.w_qkv.weight"
    rewrite(path / "llama.ckpt", add(name, torch.ones(shape)))
    assert f"{name}, {list(shape)} each, must join to [64, 32]" in refusal(path)


def test_tensor_without_bytes_is_missed_by_name(tmp_path):
    """MindSpore writes no record of it."""
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ckpt(tiny, copy_beside(tiny, tmp_path / "one"))
    rewrite(path / "llama.ckpt", add("model.norm_out.weight", torch.ones(0)))
    assert "lacks 1 tensors of the model, first model.norm.weight" in refusal(path)


def test_sizes_of_another_config_are_refused(tmp_path):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ranks(tiny, copy_beside(tiny, tmp_path / "ranks"), 2, fused=True)
    edit_config(path, intermediate_size=60)
    assert "feed_forward.w2.weight, [32, 28] each, must join to [32, 60]" in refusal(path)
    edit_config(path, intermediate_size=56, num_attention_heads=8)
    assert "attention.w" in refusal(path)
    path = ckpt(tiny, copy_beside(tiny, tmp_path / "one"))
    edit_config(path, vocab_size=47)
    assert "model.embed_tokens.weight must have shape [47, 32]" in refusal(path)


def edit_config(path: Path, **values) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


def test_other_directories_are_not_taken_for_mindformers(tmp_path):
    tiny = write_checkpoint(tmp_path / "hf", num_files=2, **SMALL)
    assert not is_mindformers(tiny)
    own = tmp_path / "unfinished"
    (own / "rank_0").mkdir(parents=True)
    shutil.copyfile(tiny / "model-00001-of-00002.safetensors", own / "rank_0/model.safetensors")
    assert not is_mindformers(own)
    write_ckpt(tiny / "training.ckpt", {"x": torch.ones(1)})
    assert not is_mindformers(tiny)
    write_ckpt(own / "training.ckpt", {"x": torch.ones(1)})
    assert is_mindformers(own)
    (own / "pytorch_model.bin").touch()
    assert not is_mindformers(own)


BAD_LAYOUTS = {
    "is not read": layout_message([2], [0, -1], field_slices=1),
    "dev_matrix [2] and tensor_map [1, -1]": layout_message([2], [1, -1]),
    "dev_matrix [2] and tensor_map [-2, -1]": layout_message([2], [-2, -1]),
    "dev_matrix [0] and tensor_map [0, -1]": layout_message([0], [0, -1]),
    "no list of lengths": layout_message([1] * 40, [0, -1]),
    "a second dev_matrix": layout_message([2], [0, -1]) + layout_message([2], [0, -1]),
    "no field of a layout": number(9, 1),
    "as 1 axes on 2 ranks": layout_message([2], [0]),
    "as 2 axes on 4 ranks": layout_message([2, 2], [0, -1]),
    "must join": layout_message([2], [-1, -1]),
    "must join to": layout_message([2], [0, 0]),
}


@pytest.mark.parametrize("message", BAD_LAYOUTS)
def test_strategy_that_does_not_fit_is_refused(tmp_path, message):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ranks(tiny, copy_beside(tiny, tmp_path / "x" / "ranks"), 2)
    name = b"model.layers.0.attention.wq.weight"
    item = field(3, field(1, name) + field(2, BAD_LAYOUTS[message]))
    (path / "a_strategy.ckpt").write_bytes(number(1, 1) + item)
    assert message in refusal(path)


def test_strategies_that_differ_and_stages_are_refused(tmp_path):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ranks(tiny, copy_beside(tiny, tmp_path / "x" / "ranks"), 2, strategy=STRATEGY)
    name = "model.layers.0.attention.wq.weight"
    write_strategy(path / "other_strategy.ckpt", {name: ([2], [-1, 0])})
    assert "must say the same" in refusal(path)
    write_strategy(path / "other_strategy.ckpt", {"1-" + name: ([2], [0, -1])})
    assert "stage of a pipeline" in refusal(path)


def test_strategy_may_be_json(tmp_path):
    tiny = write_checkpoint(tmp_path / "hf", **SMALL)
    path = ranks(tiny, copy_beside(tiny, tmp_path / "x" / "ranks"), 2)
    names = list(to_mindformers(hf_weights(tiny)))
    write_strategy(path / "a_strategy.ckpt", layouts(names, [2], (EMBEDDING, HEAD)))
    text = {"current_stage": 0, "parallel_strategy_item": {}, "parallel_layout_item": {
        name: {
            "dev_matrix": devices, "tensor_map": axes, "param_split_shape": [],
            "indices_offset": [], "field": 0, "opt_weight_shard_size": 0, "opt_weight_shard_step": 0,
        }
        for name, (devices, axes) in layouts(names, [2], (EMBEDDING, HEAD)).items()
    }}  # fmt: skip
    (path / "strategy.json").write_text(json.dumps(text))
    assert find_strategy(path) == read_strategy(path / "a_strategy.ckpt")
    open_checkpoint(path)
    text["parallel_layout_item"][names[0]]["tensor_map"] = ["0", -1]
    (path / "strategy.json").write_text(json.dumps(text))
    assert "tensor_map ['0', -1]" in refusal(path)


@pytest.mark.parametrize(
    ("devices", "axes", "cuts", "slices"),
    [
        ([2], [0, -1], (2, 1), [(0, 0), (1, 0)]),
        ([2], [-1, 0], (1, 2), [(0, 0), (0, 1)]),
        ([2, 3], [0, 1], (3, 2), [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]),
        ([2, 2], [1], (2,), [(0,), (0,), (1,), (1,)]),
        ([4], [], (), [(), (), (), ()]),
    ],
)
def test_rank_has_the_slice_of_its_place_in_the_grid(devices, axes, cuts, slices):
    layout = ParameterLayout(tuple(devices), tuple(axes))
    assert layout.cuts == cuts
    assert [layout.slice_of(rank) for rank in range(layout.num_ranks)] == slices


def test_damaged_strategy_is_refused_or_read(tmp_path):
    """Cut anywhere, or any byte changed: no exception but ours."""
    path = tmp_path / "strategy.ckpt"
    data = write_strategy(path, {"a.wq.weight": ([2], [0, -1]), "b": ([2, 4], [1])}).read_bytes()
    assert read_strategy(path)["b"] == ParameterLayout((2, 4), (1,))
    draw = random.Random(0)
    changed = [data[:length] for length in range(len(data))]
    for at in [*range(len(data))] * 2:
        copy = bytearray(data)
        copy[at] ^= draw.randrange(1, 256)
        changed.append(bytes(copy))
    outcomes = set()
    for item in changed:
        path.write_bytes(item)
        try:
            outcomes.add(len(read_strategy(path)))
        except CheckpointError as error:
            outcomes.add(str(error)[-1])
    assert outcomes == {".", 1, 2}
