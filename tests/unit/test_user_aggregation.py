"""User-level privacy's sums: clipped in exact arithmetic, noisy once, divided by what is known beforehand."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft_dist.config.schema import UserPrivacy
from fedpeft_dist.federation.user_aggregation import UserAggregator
from fedpeft_dist.training.local_training import ClientUpdate
from tests.numerics.cases import make_runtime

P, SEED, COHORT, POPULATION = 400, 5, 8, 64


def make_aggregator(
    noise=0.0, count_noise=None, clip_norm=1.0, size=P, runtime=None, population=POPULATION, **privacy
) -> UserAggregator:
    config = UserPrivacy(name="user", clip_norm=clip_norm, noise_multiplier=1.0, **privacy)
    return UserAggregator(size, population, COHORT, config, noise, count_noise, runtime or make_runtime(), SEED)


def update(delta: torch.Tensor, client: int = 0, weight: int = 1, loss: float = 1.0) -> ClientUpdate:
    return ClientUpdate(client, weight, delta, torch.tensor(loss), num_samples=3)


def random_deltas(count: int, scale: float, size: int = P) -> torch.Tensor:
    return scale * torch.randn(count, size, generator=torch.Generator().manual_seed(0))


numbers = st.floats(-1023, 1023, width=32) | st.sampled_from([math.nan, math.inf, 5000.0, 1e-40])


@settings(max_examples=150, deadline=None)
@given(
    deltas=st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=1, max_size=8),
    clip_norm=st.sampled_from([1.0, 0.01, 30.0]),
)
def test_no_client_moves_the_sum_by_more_than_the_clip_norm(deltas, clip_norm):
    """In exact arithmetic, and whatever clients weigh elsewhere."""
    whole = make_aggregator(clip_norm=clip_norm, size=4)
    for client, delta in enumerate(deltas):
        whole.add(update(torch.tensor(delta), client, weight=1000))
    for left_out in range(len(deltas)):
        without = make_aggregator(clip_norm=clip_norm, size=4)
        for client, delta in enumerate(deltas):
            if client != left_out:
                without.add(update(torch.tensor(delta), client))
        change = (whole.total[:4] - without.total[:4]).tolist()
        norm = sum(Fraction(value) ** 2 for value in change) / Fraction(4) ** whole.bits
        assert norm <= Fraction(clip_norm) ** 2


def test_the_mean_is_of_clipped_deltas_over_the_expected_cohort():
    deltas = random_deltas(5, 0.1)
    deltas[0] *= 1e-3
    aggregator = make_aggregator()
    for client, delta in enumerate(deltas):
        aggregator.add(update(delta, client, weight=10 + client))
    norms = deltas.double().norm(dim=1, keepdim=True)
    assert norms.min() < 1 < norms[1:].min()
    expected = (deltas.double() * (1 / norms).clamp(max=1.0)).sum(dim=0) / COHORT
    result = aggregator.reduce(0)
    torch.testing.assert_close(result.mean_delta.double(), expected, rtol=2e-6, atol=1e-12)
    assert result.train_loss == 1.0


def test_a_rejected_delta_counts_as_zero_and_the_denominator_stays():
    delta = random_deltas(1, 0.001)[0]
    alone, beside = make_aggregator(), make_aggregator()
    for aggregator in (alone, beside):
        aggregator.add(update(delta))
    beside.add(update(torch.full((P,), math.nan), client=7))
    assert beside.rejected_clients() == [7]
    first, second = alone.reduce(0), beside.reduce(0)
    assert torch.equal(first.mean_delta, second.mean_delta)
    assert second.num_rejected == 1


def test_an_empty_cohort_is_a_step_of_noise_of_the_right_size():
    size = 200_000
    aggregator = make_aggregator(noise=2.5, clip_norm=0.3, size=size)
    means = [aggregator.reduce(number).mean_delta.double() for number in range(2)]
    deviation = 2.5 * 0.3 / COHORT
    for mean in means:
        assert abs(mean.mean()) < 5 * deviation / math.sqrt(size)
        assert abs(mean.std() / deviation - 1) < 5 / math.sqrt(2 * size)
    assert abs(torch.corrcoef(torch.stack(means))[0, 1]) < 5 / math.sqrt(size), "each round has noise of its own"
    assert torch.equal(make_aggregator(noise=2.5, clip_norm=0.3, size=size).reduce(0).mean_delta.double(), means[0])


def test_only_rank_0_adds_noise():
    """Two ranks' totals, added as the all-reduce does: the noise of one."""
    runtime = make_runtime()
    other = replace(runtime, launch=replace(runtime.launch, rank=1, world_size=2))
    main, second = make_aggregator(noise=1.0), make_aggregator(noise=1.0, runtime=other)
    alone = make_aggregator(noise=1.0).reduce(3).mean_delta
    assert torch.equal(main.reduce(3).mean_delta, alone)
    assert second.reduce(3).mean_delta.abs().max() == 0


def test_secure_noise_is_another_each_time():
    first, second = (make_aggregator(noise=1.0, secure_noise=True).reduce(0).mean_delta for _ in range(2))
    assert not torch.equal(first, second)


def test_the_largest_cohort_and_noise_fit():
    aggregator = make_aggregator(noise=20.0, population=1000, size=1)
    for client in range(1000):
        aggregator.add(update(torch.tensor([1023.0]), client))
    aggregator.total[0] += round(10 * 20.0 * 2**aggregator.bits)
    assert 0 < int(aggregator.total[0]) <= 2**62
    mean = float(aggregator._mean(aggregator.total[:1], 1000))
    assert mean == pytest.approx((1000 + 200) / COHORT, rel=1e-5)


@pytest.mark.parametrize("start", [0.01, 40.0])
def test_the_clip_norm_finds_the_quantile(start):
    """Andrew et al.'s update: from far below and far above, with a noisy count, to the norm that 70 % stay below."""
    aggregator = make_aggregator(
        clip_norm=start, count_noise=0.4, population=COHORT, adaptive={"quantile": 0.7, "lr": 0.2}
    )
    sizes = torch.linspace(0.5, 1.5, COHORT)
    found = []
    for number in range(300):
        for client, norm in enumerate(sizes):
            delta = torch.zeros(P)
            delta[number % P] = norm
            aggregator.add(update(delta, client))
        aggregator.reduce(number)
        found.append(aggregator.clip_norm)
    settled = torch.tensor(found[100:])
    assert 1.1 < settled.mean() < 1.35, "between the fifth and the seventh of eight norms"


def test_the_count_is_noisy_and_exact_without_noise():
    def step(count_noise, number=0):
        aggregator = make_aggregator(count_noise=count_noise, population=COHORT, adaptive={"quantile": 0.5, "lr": 1.0})
        for client in range(COHORT):
            aggregator.add(update(torch.full((P,), 1.0 if client < 2 else 1e-4), client))
        aggregator.reduce(number)
        return aggregator.clip_norm

    share = 6 / COHORT
    assert step(None) == pytest.approx(math.exp(-(share - 0.5)), rel=1e-12)
    noise = torch.tensor([-math.log(step(1.5, number)) + 0.5 - share for number in range(400)]) * COHORT
    assert abs(noise.mean()) < 5 * 1.5 / math.sqrt(400)
    assert abs(noise.std() / 1.5 - 1) < 5 / math.sqrt(2 * 400)


def test_a_dropped_round_leaves_the_clip_norm():
    aggregator = make_aggregator(count_noise=0.4, adaptive={"quantile": 0.5, "lr": 1.0})
    aggregator.add(update(torch.full((P,), 1e-4)))
    assert aggregator.reduce(0, is_dropped=True).is_dropped
    assert aggregator.clip_norm == 1.0
