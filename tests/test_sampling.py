"""The logits processors, against those of transformers."""

from __future__ import annotations

import pytest
import torch

from parallel.errors import NumericsError
from parallel.generation.sampling import Sampling, next_token, process_logits, prompt_generator

transformers = pytest.importorskip("transformers")


def oracle(logits, seen, sampling):
    processors = transformers.LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(
            transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        )
    if sampling.temperature != 1.0:
        processors.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(sampling.top_p))
    return processors(torch.tensor([seen]), logits[None].clone())[0]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(True, 0.7),
        Sampling(True, 1.0, top_k=5),
        Sampling(True, 1.0, top_k=1000),
        Sampling(True, 1.0, top_p=0.9),
        Sampling(True, 1.0, top_p=1e-6),
        Sampling(True, 1.0, repetition_penalty=1.3),
        Sampling(True, 1.4, top_k=20, top_p=0.6, repetition_penalty=0.8),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_logits_equal_those_of_transformers(sampling, seed):
    logits = 4 * torch.randn(200, generator=torch.Generator().manual_seed(seed))
    logits[10:20] = logits[10]  # ties at the edge of top_k and top_p
    seen = [3, 17, 3, 199]
    expected = oracle(logits, seen, sampling)
    torch.testing.assert_close(process_logits(logits, seen, sampling), expected, rtol=0, atol=0)


def test_greedy_takes_the_most_likely_after_the_penalty():
    logits = torch.tensor([1.0, 3.0, 2.9])
    generator = prompt_generator(0, 0)
    assert next_token(logits, [1], Sampling(), generator) == 1
    assert next_token(logits, [1], Sampling(repetition_penalty=2.0), generator) == 2


def test_random_numbers_depend_on_seed_and_prompt_alone():
    def draw(seed, index):
        return torch.rand(4, generator=prompt_generator(seed, index)).tolist()

    assert draw(1, 2) == draw(1, 2)
    assert draw(1, 2) != draw(1, 3)
    assert draw(1, 2) != draw(2, 2)


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.0, 1.0, -1.0])
    generator = prompt_generator(0, 0)
    draws = [next_token(logits, [], Sampling(True), generator) for _ in range(3000)]
    shares = torch.bincount(torch.tensor(draws), minlength=3) / 3000
    # Three standard deviations of a share of 3000 draws are 0.027.
    torch.testing.assert_close(shares, logits.softmax(-1), rtol=0, atol=0.03)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_that_are_no_numbers_end_the_run(bad, do_sample):
    logits = torch.tensor([0.0, bad, 1.0])
    with pytest.raises(NumericsError, match="NaN or an infinity"):
        next_token(logits, [], Sampling(do_sample), prompt_generator(0, 0))
