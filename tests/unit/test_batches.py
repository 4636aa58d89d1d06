"""Batches: in epochs every sample comes once, and under sample-level privacy each is drawn by itself."""

from __future__ import annotations

import math
from itertools import chain, islice

import pytest
import torch

from fedpeft_dist.training.batches import EpochBatches, PoissonBatches

SEED, ROUND = 3, 2


def batches_of(batches: EpochBatches, samples: torch.Tensor, num_steps: int, client: int = 0) -> list[list[int]]:
    return [batch.tolist() for batch in islice(batches.of(samples, client, ROUND), num_steps)]


# --- epochs ------------------------------------------------------------------------------------------------------

BATCH = 4


def test_every_epoch_covers_the_samples_once_in_an_order_of_its_own() -> None:
    samples = 7 * torch.arange(10) + 3001
    batches = batches_of(EpochBatches(BATCH, SEED), samples, 15)
    assert [len(batch) for batch in batches] == [4, 4, 2] * 5
    orders = [list(chain(*batches[i : i + 3])) for i in range(0, 15, 3)]
    assert all(sorted(order) == samples.tolist() for order in orders)
    assert len({tuple(order) for order in orders}) == 5


@pytest.mark.parametrize(("size", "num_steps"), [(10, 1), (10, 3), (10, 7), (10, 8), (3, 5), (4, 6), (1, 2)])
def test_a_fixed_number_of_steps_goes_on_into_further_epochs(size: int, num_steps: int) -> None:
    samples = 7 * torch.arange(size) + 2001
    batches = batches_of(EpochBatches(BATCH, SEED), samples, num_steps)
    assert len(batches) == num_steps
    per_epoch = -(-size // BATCH)
    sizes = [BATCH] * (size // BATCH) + [size % BATCH] * (size % BATCH > 0)
    assert [len(batch) for batch in batches] == [sizes[step % per_epoch] for step in range(num_steps)]
    for start in range(0, num_steps, per_epoch):
        seen = list(chain(*batches[start : start + per_epoch]))
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(samples.tolist())
        if start + per_epoch <= num_steps:
            assert sorted(seen) == samples.tolist()


# --- random draws ------------------------------------------------------------------------------------------------


def test_another_noise_seed_draws_other_batches() -> None:
    for client in range(2):
        first, second = (batches_of(PoissonBatches(4, seed), torch.arange(40), 5, client) for seed in (SEED, SEED + 1))
        assert first != second


def test_clients_draw_by_themselves() -> None:
    first, second = (batches_of(PoissonBatches(4, SEED), torch.arange(40), 5, client) for client in range(2))
    assert first != second


def test_every_sample_is_drawn_with_its_probability_by_itself() -> None:
    size, batch, steps = 50, 10, 4000
    drawn = torch.zeros(steps, size)
    for step, samples in enumerate(batches_of(PoissonBatches(batch, SEED), torch.arange(size), steps)):
        drawn[step, samples] = 1
    q = batch / size
    error = math.sqrt(q * (1 - q) / steps)
    assert (drawn.mean(dim=0) - q).abs().max() < 5 * error
    sizes = drawn.sum(dim=1)
    assert abs(sizes.mean() - batch) < 5 * math.sqrt(size * q * (1 - q) / steps)
    assert abs(sizes.var() / (size * q * (1 - q)) - 1) < 5 * math.sqrt(2 / steps), "binomial, so not of a fixed size"
    correlations = torch.corrcoef(drawn.T)[~torch.eye(size, dtype=torch.bool)]
    assert correlations.abs().max() < 6 / math.sqrt(steps)


def test_a_client_smaller_than_a_batch_draws_all_its_samples() -> None:
    batches = PoissonBatches(8, SEED)
    assert batches_of(batches, torch.arange(3), 4) == [[0, 1, 2]] * 4
    assert batches.expected(3) == 3
    assert batches.expected(30) == 8


def test_truncation_keeps_a_random_subset() -> None:
    batches = PoissonBatches(20, SEED, max_batch=5)
    assert batches.expected(100) == 5
    counts = torch.zeros(100)
    for key in range(4000):
        batch = batches.draw(torch.arange(100), key)
        assert len(batch) <= 5
        assert len(set(batch.tolist())) == len(batch)
        counts[batch] += 1
    share = counts / counts.sum()
    assert (share - 0.01).abs().max() < 6 * math.sqrt(0.01 / counts.sum())


def test_secure_draws_differ_each_time() -> None:
    batches = PoissonBatches(50, SEED, secure=True)
    first, second = (batches.draw(torch.arange(1000), 1) for _ in range(2))
    assert first.tolist() != second.tolist()
    assert 10 < len(first) < 110
