"""Loading: every parameter in its place once, and nothing else left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.checkpoint.open import open_checkpoint
from parallel.errors import CheckpointError
from parallel.group import LoneGroup, SimulatedGroup
from parallel.load import load_decoder
from quant.scheme import QuantScheme
from tests.checkpoints import write_checkpoint
from tests.models import CPU, RTN


def load_parts(path: Path, scheme: QuantScheme = RTN, *, rank: int = 0, size: int = 1, **how):
    """The decoder, its timings, and the layout of a rank without the others."""
    checkpoint = open_checkpoint(path)
    layout = checkpoint.layout(scheme)
    group = LoneGroup() if size == 1 else SimulatedGroup(rank, size)
    how = {"dtype": torch.float32, "device": CPU, "max_length": 8, **how}
    decoder, timings = load_decoder(layout, checkpoint.source, group, **how)
    return decoder, timings, layout


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", [QuantScheme(), RTN], ids=["none", "w8a16"])
def test_weight_bytes_are_those_that_were_told_and_planned(tmp_path, scheme, tied):
    path = write_checkpoint(tmp_path, tie_word_embeddings=tied)
    for rank in range(2):
        told: list[int] = []
        _, timings, layout = load_parts(path, scheme, rank=rank, size=2, on_bytes=told.append)
        assert timings.weight_bytes == sum(told) == layout.rank_bytes(rank, 2)


def test_a_tied_head_is_the_embedding_and_not_a_copy(tmp_path):
    path = write_checkpoint(tmp_path, tie_word_embeddings=True)
    decoder, _, _ = load_parts(path, QuantScheme())
    head, embedding = decoder.lm_head.local_weight, decoder.embed_tokens.local_weight
    assert isinstance(head, torch.Tensor)
    assert head.data_ptr() == embedding.data_ptr()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_seconds_are_told_and_threads_of_torch_left_alone(tmp_path, num_threads):
    before = torch.get_num_threads()
    _, timings, _ = load_parts(write_checkpoint(tmp_path), num_threads=num_threads)
    assert torch.get_num_threads() == before
    assert timings.num_threads == num_threads
    spent = timings.read_s + timings.convert_s + timings.pack_s
    assert 0 < spent < num_threads * timings.wall_s + 0.01
    assert min(timings.read_s, timings.convert_s, timings.pack_s) > 0


def test_a_damaged_weight_ends_the_loading_with_its_name(tmp_path):
    path = write_checkpoint(tmp_path)
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight cannot be"):
        load_parts(path, num_threads=2)


MEMORY_SCRIPT = """
import sys, torch
from pathlib import Path
from tests.memory import watch_memory
from tests.test_load import load_parts
torch.set_num_threads(1)
loaded, peak, after = watch_memory(lambda: load_parts(Path(sys.argv[1]), num_threads=2))
print(peak, after, loaded[1].weight_bytes)
"""


def test_anonymous_memory_of_loading_is_the_weights_and_a_few_tensors(tmp_path):
    """Quantized on the fly from 0.4 GB of float32: neither the source nor its integers stay."""
    path = write_checkpoint(
        tmp_path, num_hidden_layers=8, hidden_size=1024, intermediate_size=2816,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(path)],
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    peak, after, weight_bytes = map(int, done.stdout.split())
    # A thread has the rows of one tensor in hand: 16 MB of float32 a few times over, and integers.
    assert peak < weight_bytes + 2 * 75_000_000
    assert after < weight_bytes + 40_000_000
