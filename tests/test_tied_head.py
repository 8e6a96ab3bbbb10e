"""A tied lm_head that stands in the files all the same: the logits of transformers, whatever it is."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.__main__ import main
from parallel.checkpoint.export import write_export
from parallel.checkpoint.open import describe_layout, open_checkpoint
from parallel.checkpoint.tied_head import KEPT_APART
from parallel.errors import CheckpointError
from parallel.model.placements import EMBEDDING, HEAD
from quant.scheme import QuantScheme
from tests.checkpoints import CONFIG, random_weights, write_checkpoint, write_weights
from tests.models import RTN, generate, logits
from tests.test_prepared import merged, prepare

IDS = [1, 5, 99, 7, 1033, 64]
TIED = {**CONFIG, "tie_word_embeddings": True}
# float32, sums in another order.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


def permuted(weight: torch.Tensor) -> torch.Tensor:
    return weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(1))]


def last_row_moved(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([weight[:-1], weight[-1:] + 1])


HEADS = {
    "equal": torch.clone,
    "permuted": permuted,
    "other in its last row": last_row_moved,
    "equal in bfloat16": torch.Tensor.bfloat16,
    "other in bfloat16": lambda weight: permuted(weight).bfloat16(),
}
DIFFERENT = ("permuted", "other in its last row", "other in bfloat16")


def weights_with(head: str) -> dict[str, torch.Tensor]:
    weights = random_weights(TIED, torch.float32, 0)
    # bfloat16 holds the embedding too, so that a head in it may be equal.
    weights[EMBEDDING] = weights[EMBEDDING].bfloat16().float()
    return {**weights, HEAD: HEADS[head](weights[EMBEDDING])}


def write_tied(path: Path, head: str, *, kind: str = "safetensors") -> Path:
    """A tied checkpoint with another head in its files."""
    write_checkpoint(path, tie_word_embeddings=True)
    weights = weights_with(head)
    if kind == "shards":
        (path / "model.safetensors").unlink()
        write_weights(path, weights, 3)
    elif kind == "bin":
        (path / "model.safetensors").unlink()
        torch.save(weights, path / "pytorch_model.bin")
    else:
        write_weights(path, weights)
    return path


def their_logits(path: Path) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def check_logits(path: Path, wanted: torch.Tensor) -> None:
    for size in (1, 2):
        torch.testing.assert_close(logits(path, IDS, size), wanted[:-1], **FLOAT32)


@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin"])
@pytest.mark.parametrize("head", HEADS)
def test_logits_are_those_of_transformers_whatever_the_second_head_holds(tmp_path, head, kind):
    path = write_tied(tmp_path, head, kind=kind)
    check_logits(path, their_logits(path))
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.tie_word_embeddings == (head not in DIFFERENT)
    assert checkpoint.notes == ((KEPT_APART,) if head in DIFFERENT else ())
    # Equal ones are held once.
    assert (HEAD in checkpoint.layout(QuantScheme()).table) == (head in DIFFERENT)


def test_a_head_that_was_saved_alone_is_the_embedding_too(tmp_path):
    path = write_checkpoint(tmp_path / "source", tie_word_embeddings=True)
    weights = random_weights(TIED, torch.float32, 0)
    weights[HEAD] = weights.pop(EMBEDDING)
    for num_files in (1, 3):
        for file in path.glob("model*"):
            file.unlink()
        write_weights(path, weights, num_files)
        check_logits(path, their_logits(path))
    describe_layout(path, QuantScheme(), {}, vocab_emb_dp=False)
    prepared = prepare(path, tmp_path / "tp2", 2, QuantScheme())
    assert torch.equal(merged(prepared)[EMBEDDING], weights[HEAD])


def test_a_head_alone_is_no_embedding_of_an_untied_model(tmp_path):
    path = write_checkpoint(tmp_path)
    weights = random_weights(CONFIG, torch.float32, 0)
    del weights[EMBEDDING]
    write_weights(path, weights)
    with pytest.raises(CheckpointError, match=f"first {EMBEDDING}"):
        open_checkpoint(path).layout(QuantScheme())


def test_a_second_head_of_another_shape_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, tie_word_embeddings=True)
    weights = random_weights(TIED, torch.float32, 0)
    write_weights(path, {**weights, HEAD: weights[EMBEDDING][:-1].clone()})
    with pytest.raises(CheckpointError, match=f"{HEAD} must have shape"):
        open_checkpoint(path).layout(QuantScheme())


def test_prepare_and_export_keep_both_and_say_that_they_are_not_tied(tmp_path):
    source = write_tied(tmp_path / "source", "permuted")
    prepared = prepare(source, tmp_path / "tp2", 2, QuantScheme())
    again = prepare(prepared, tmp_path / "tp4", 4, QuantScheme())
    checkpoint = open_checkpoint(again)
    write_export(
        checkpoint.layout(QuantScheme()),
        checkpoint.source,
        tmp_path / "hf",
        max_shard_bytes=1 << 30,
    )
    for path in (prepared, again, tmp_path / "hf"):
        assert not json.loads((path / "config.json").read_text())["tie_word_embeddings"]
        assert open_checkpoint(path).notes == ()
    found, wanted = load_file(tmp_path / "hf/model.safetensors"), weights_with("permuted")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    check_logits(again, their_logits(source))
    torch.testing.assert_close(their_logits(tmp_path / "hf"), their_logits(source), rtol=0, atol=0)


def test_equal_heads_stay_tied_through_prepare_and_export(tmp_path):
    prepared = prepare(write_tied(tmp_path / "source", "equal"), tmp_path / "tp2", 2, QuantScheme())
    assert json.loads((prepared / "config.json").read_text())["tie_word_embeddings"]
    assert HEAD not in merged(prepared)


def test_a_second_head_that_is_quantized_is_made_of_its_own_weights(tmp_path):
    every = QuantScheme(quant_method="rtn", weight_dtype="int8", modules_to_not_convert=())
    tied = write_tied(tmp_path / "tied", "permuted")
    plain = write_checkpoint(tmp_path / "plain")
    write_weights(plain, weights_with("permuted"))
    assert torch.equal(logits(tied, IDS, 2, scheme=every), logits(plain, IDS, 2, scheme=every))
    assert generate(prepare(tied, tmp_path / "tp2", 2, every), [IDS], 2) == generate(
        plain, [IDS], 1, scheme=every
    )


def test_compressed_checkpoint_with_another_head_keeps_both(tmp_path):
    prepared = prepare(write_tied(tmp_path / "source", "permuted"), tmp_path / "tp1", 1, RTN)
    checkpoint = open_checkpoint(prepared)
    path = tmp_path / "compressed"
    write_export(checkpoint.layout(QuantScheme()), checkpoint.source, path, max_shard_bytes=1 << 30)
    expected = logits(path, IDS, 1)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert open_checkpoint(path).notes == (KEPT_APART,)
    assert torch.equal(logits(path, IDS, 1), expected)


def test_weights_that_share_their_bytes_in_a_pickle_are_not_compared(tmp_path, monkeypatch):
    """Every tied model's .bin has both names: reading them would cost each process the embedding."""
    path = write_checkpoint(tmp_path, tie_word_embeddings=True)
    (path / "model.safetensors").unlink()
    weights = random_weights(TIED, torch.float32, 0)
    torch.save({**weights, HEAD: weights[EMBEDDING]}, path / "pytorch_model.bin")
    monkeypatch.setattr("parallel.checkpoint.tied_head._are_equal", None)
    assert open_checkpoint(path).config.tie_word_embeddings


def test_comparing_ends_at_the_first_difference(tmp_path, monkeypatch):
    path = write_tied(tmp_path, "permuted")
    monkeypatch.setattr("parallel.checkpoint.tied_head._BLOCK_ENTRIES", 64 * 4)
    source = open_checkpoint(path).source
    reads = []
    original = type(source).read
    monkeypatch.setattr(
        type(source), "read", lambda self, *of: reads.append(of) or original(self, *of)
    )
    open_checkpoint(path)
    assert len(reads) == 2


@pytest.mark.parametrize("head", ["permuted", "equal"])
def test_plan_counts_both_and_says_so(tmp_path, capsys, head):
    path = write_tied(tmp_path, head)
    layout = describe_layout(path, QuantScheme(), {}, vocab_emb_dp=False)
    main(["plan", f"checkpoint={path}", "parallel.tp=1", "plan.json=true"])
    assert (HEAD in layout.table) == (KEPT_APART in capsys.readouterr().err) == (head != "equal")


@pytest.mark.parametrize("task", ["generate", "prepare"])
def test_the_command_says_once_that_both_are_kept(tmp_path, task):
    path = write_tied(tmp_path / "source", "permuted")
    more = {
        "generate": ["prompt=12", "generation.max_new_tokens=2", f"run_root={tmp_path}/runs"],
        "prepare": [f"output={tmp_path}/tp2"],
    }[task]
    found = subprocess.run(
        [sys.executable, "-m", "launcher", task, f"checkpoint={path}", "parallel.tp=2", *more],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr.count(KEPT_APART) == 1


def test_the_heads_of_a_real_model_give_the_text_of_transformers(shared, tmp_path):
    plain = shared / "checkpoints/stories260K/hf"
    weights = load_file(plain / "model.safetensors")
    (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    save_file({**weights, HEAD: permuted(weights[EMBEDDING])}, tmp_path / "model.safetensors")
    wanted = their_logits_of(tmp_path, [1, 403, 407, 261, 378])
    torch.testing.assert_close(logits(tmp_path, [1, 403, 407, 261, 378], 2), wanted, **FLOAT32)


def their_logits_of(path: Path, ids: list[int]) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1]
