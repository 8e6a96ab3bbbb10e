"""Running a checkpoint on n ranks that are threads of the test."""

from __future__ import annotations

from pathlib import Path

import torch

from parallel.checkpoint.open import Checkpoint, open_checkpoint
from parallel.generation.decode import Completion, GenerationLoop, Request
from parallel.generation.sampling import Sampling
from parallel.generation.score import score
from parallel.group import Group, LoneGroup, ThreadGroup
from parallel.load import load_decoder
from parallel.model.decoder import Decoder
from quant.kernels import Kernel
from quant.scheme import QuantScheme

CPU = torch.device("cpu")
RTN = QuantScheme(quant_method="rtn", weight_dtype="int8")


def run_ranks(size, work):
    """The results of work(group) on every rank."""
    return [work(LoneGroup())] if size == 1 else ThreadGroup.run(size, work)


def load(
    checkpoint: Checkpoint,
    group: Group,
    scheme: QuantScheme = QuantScheme(),  # noqa: B008  # frozen
    dtype: torch.dtype = torch.float32,
    *,
    length: int = 256,
    vocab_emb_dp: bool = False,
    kernel: Kernel | None = None,
    exact_sums: bool | None = None,
) -> Decoder:
    layout = checkpoint.layout(scheme, vocab_emb_dp=vocab_emb_dp)
    decoder, _ = load_decoder(
        layout, checkpoint.source, group, dtype, CPU,
        max_length=length, kernel=kernel, exact_sums=exact_sums,
    )  # fmt: skip
    return decoder


def logits(path: Path, ids: list[int], size: int, *, chunk: int = 512, **how) -> torch.Tensor:
    """float32 logits [len(ids) - 1, vocabulary] of a text."""
    checkpoint = open_checkpoint(path)

    def work(group):
        decoder = load(checkpoint, group, **how)
        return score(decoder, decoder.new_cache(1, len(ids)), ids, 1, chunk)

    return run_ranks(size, work)[0]


def generate(
    path: Path,
    prompts: list[list[int]],
    size: int,
    *,
    new_tokens: int = 20,
    rows: int = 8,
    chunk: int = 512,
    sampling: Sampling = Sampling(),  # noqa: B008  # frozen
    **how,
) -> dict[int, Completion]:
    """The completion of each prompt, checked to be the same on every rank."""
    checkpoint = open_checkpoint(path)
    requests = [Request(index, tuple(ids), new_tokens) for index, ids in enumerate(prompts)]
    length = max(map(len, prompts)) + new_tokens

    def work(group):
        decoder = load(checkpoint, group, length=length, **how)
        cache = decoder.new_cache(min(rows, len(prompts)), length)
        loop = GenerationLoop(
            decoder, cache, sampling, eos_ids=checkpoint.eos_token_ids, prefill_chunk=chunk
        )
        return {item.index: item for item in loop.run(requests)}

    results = run_ranks(size, work)
    assert all(result == results[0] for result in results)
    return results[0]
