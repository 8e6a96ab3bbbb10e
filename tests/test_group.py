"""Groups and parallel layers: n threads with real results against the unsharded operation."""

from __future__ import annotations

import time

import pytest
import torch

from parallel.group import LoneGroup, SimulatedGroup, ThreadGroup
from parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from parallel.placement import Split

SIZES = [1, 2, 4, 8]


def cut(tensor: torch.Tensor, dim: int, group) -> torch.Tensor:
    return tensor[Split(dim).index(tuple(tensor.shape), group.rank, group.size)]


@pytest.fixture
def tensors():
    random = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=random)


@pytest.mark.parametrize("size", SIZES)
def test_collectives_agree_on_every_rank(size):
    def work(group):
        mine = torch.full((size,), float(group.rank))
        return (
            group.all_reduce(mine.clone()),
            group.all_reduce(mine.clone(), "max"),
            torch.stack(group.all_gather(mine)),
            group.broadcast(mine.clone(), size - 1),
            group.reduce_scatter(torch.arange(size).float()),
            group.gather(mine),
        )

    for rank, (total, largest, gathered, sent, part, on_zero) in enumerate(
        ThreadGroup.run(size, work)
    ):
        assert (total == sum(range(size))).all()
        assert (largest == size - 1).all()
        assert gathered[:, 0].tolist() == list(range(size))
        assert (sent == size - 1).all()
        assert part.tolist() == [rank * size]
        assert (on_zero is not None) == (rank == 0)


def test_send_and_recv_pass_a_tensor_on():
    def work(group):
        if group.rank == 0:
            group.send(torch.tensor([7.0]), 1)
            return None
        return group.recv(torch.zeros(1), 0)

    assert ThreadGroup.run(2, work)[1].item() == 7


def test_error_of_one_thread_rank_ends_the_others():
    def work(group):
        if group.rank == 1:
            raise KeyError("rank 1")
        group.barrier()

    with pytest.raises(KeyError, match="rank 1"):
        ThreadGroup.run(3, work)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ffn", [16, 172])
def test_column_then_row_equals_the_unsharded_pair(size, ffn, tensors):
    x, up, down = tensors(5, 12), tensors(ffn, 12), tensors(12, ffn)
    up_bias, down_bias = tensors(ffn), tensors(12)

    def work(group):
        column = ColumnParallelLinear(cut(up, 0, group), cut(up_bias, 0, group))
        return RowParallelLinear(cut(down, 1, group), down_bias, group)(column(x))

    expected = (x @ up.T + up_bias) @ down.T + down_bias
    for result in ThreadGroup.run(size, work):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_row_parallel_adds_bias_once(size, tensors):
    bias = tensors(6)

    def work(group):
        return RowParallelLinear(torch.zeros(6, 2), bias, group)(torch.zeros(3, 2))

    for result in ThreadGroup.run(size, work):
        assert torch.equal(result, bias.expand(3, 6))


def test_row_parallel_in_bfloat16_rounds_once(tensors):
    """Partial sums travel in float32: the result is the rounded sum, not a sum of rounded parts."""
    x, weight = tensors(4, 64).bfloat16(), tensors(8, 64).bfloat16()

    def work(group):
        return RowParallelLinear(cut(weight, 1, group), None, group)(cut(x, 1, group))

    exact = (x.float() @ weight.float().T).bfloat16()
    for result in ThreadGroup.run(4, work):
        assert (result != exact).float().mean() < 0.05  # a float32 sum on the edge of two bfloat16s


@pytest.mark.parametrize("size", SIZES)
def test_bias_in_bfloat16_is_rounded_once_with_the_sum(size, tensors):
    x, weight = tensors(40, 64).bfloat16(), tensors(32, 64).bfloat16()
    bias = 30 * tensors(32).bfloat16()

    def work(group):
        return RowParallelLinear(cut(weight, 1, group), bias, group)(cut(x, 1, group))

    exact = (x.float() @ weight.float().T + bias.float()).bfloat16()
    for result in ThreadGroup.run(size, work):
        assert (result != exact).float().mean() < 0.01  # a float32 sum on the edge of two bfloat16s


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vocab", [32, 37])
def test_vocab_parallel_embedding_and_head_for_a_batch(size, vocab, tensors):
    weight, ids = tensors(vocab, 6), torch.tensor([0, vocab - 1, 5, 16, 5])

    def work(group):
        start = Split(0).index((vocab, 6), group.rank, group.size)[0].start
        sizes = tuple(
            (lambda c: c.stop - c.start)(Split(0).index((vocab,), r, size)[0]) for r in range(size)
        )
        rows = VocabParallelEmbedding(cut(weight, 0, group), start, group)(ids)
        return rows, VocabParallelHead(cut(weight, 0, group), sizes, group)(rows)

    results = ThreadGroup.run(size, work)
    for rows, _ in results:
        assert torch.equal(rows, weight[ids])
    torch.testing.assert_close(results[0][1], weight[ids] @ weight.T)
    assert all(logits is None for _, logits in results[1:])


def test_simulated_group_has_the_shapes_of_a_larger_job():
    group = SimulatedGroup(3, 8)
    x = torch.ones(16)
    assert group.all_reduce(x).shape == x.shape
    assert len(group.all_gather(x)) == 8
    assert group.reduce_scatter(x).shape == (2,)
    assert group.counts["all_reduce"] == 1


def test_simulated_group_adds_up_what_collectives_would_cost():
    def cost_s(name, num_bytes):
        return 1.0 if name == "gather" else 1e-3 * num_bytes

    group = SimulatedGroup(0, 4, cost_s)
    group.calls = []
    for _ in range(2):
        group.all_reduce(torch.ones(16))
    group.gather(torch.ones(1))
    assert group.calls == [pytest.approx(0.064), pytest.approx(0.064), 1.0]


def test_seconds_of_a_collective_are_those_of_waiting_too():
    def work(group):
        group.calls = []
        if group.rank == 0:
            time.sleep(0.05)
        group.all_reduce(torch.ones(3))
        return group.calls

    _, early = ThreadGroup.run(2, work)
    assert early[0] > 0.02


def test_sums_of_16_bits_are_rounded_once():
    def work(group):
        return group.all_reduce(torch.tensor([256.0, 1.0, 1.0, 1.0])[group.rank].bfloat16())

    assert [total.item() for total in ThreadGroup.run(4, work)] == [260.0] * 4


def test_lone_group_changes_nothing():
    x = torch.ones(3)
    assert LoneGroup().all_reduce(x) is x
