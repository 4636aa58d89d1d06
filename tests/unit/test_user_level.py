"""User-level privacy's sums: clipped in exact arithmetic, noisy once, divided by what is known beforehand."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft_dist.config.schema import UserPrivacy
from fedpeft_dist.federation.aggregation import Aggregation, RoundTotal
from fedpeft_dist.federation.round import _sum as sum_over_ranks
from fedpeft_dist.federation.watch import Watch
from fedpeft_dist.privacy.user_level import NoisyMean
from fedpeft_dist.runtime.interrupts import StopRequest
from fedpeft_dist.runtime.launch import Launch
from fedpeft_dist.runtime.process import Runtime
from tests.aggregation_fixtures import make_aggregation, make_update

P, SEED, COHORT, POPULATION = 400, 5, 8, 64


def make_rule(
    noise: float = 0.0,
    count_noise: float | None = None,
    clip_norm: float = 1.0,
    population: int = POPULATION,
    **privacy: Any,
) -> NoisyMean:
    config = UserPrivacy(name="user", clip_norm=clip_norm, noise_multiplier=1.0, **privacy)
    return NoisyMean(config, clip_norm, population, COHORT, noise, count_noise, SEED)


def aggregation_of(rule: NoisyMean, size: int = P) -> Aggregation:
    return make_aggregation(size, rule.largest_cohort, rule)


def total_of(aggregation: Aggregation, round_number: int = 0) -> RoundTotal:
    """The round's total where there is one rank."""
    aggregation.add_noise(round_number)
    return aggregation.total(aggregation.sums)


def total_on_rank(rank: int, aggregation: Aggregation, round_number: int) -> RoundTotal:
    """What a rank brings to the round's total, as the round's all-reduce takes it."""
    runtime = Runtime(Launch(rank=rank, world_size=2), torch.device("cpu"), "fp32", threads=1)
    simulation = SimpleNamespace(runtime=runtime, trainer=SimpleNamespace(num_passes=0, num_padded=0))
    total, *_ = sum_over_ranks(aggregation, round_number, Watch(StopRequest()), simulation)
    return total


def random_deltas(count: int, scale: float, size: int = P) -> torch.Tensor:
    return scale * torch.randn(count, size, generator=torch.Generator().manual_seed(0))


numbers = st.floats(-1023, 1023, width=32) | st.sampled_from([math.nan, math.inf, 5000.0, 1e-40])


@settings(max_examples=150, deadline=None)
@given(
    deltas=st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=1, max_size=8),
    clip_norm=st.sampled_from([1.0, 0.01, 30.0]),
)
def test_no_client_moves_the_sum_by_more_than_the_clip_norm(deltas, clip_norm) -> None:
    """In exact arithmetic, and whatever clients weigh elsewhere."""
    rule = make_rule(clip_norm=clip_norm)
    whole = aggregation_of(rule, size=4)
    for client, delta in enumerate(deltas):
        whole.add(make_update(delta, client=client, weight=1000))
    for left_out in range(len(deltas)):
        without = aggregation_of(rule, size=4)
        for client, delta in enumerate(deltas):
            if client != left_out:
                without.add(make_update(delta, client=client))
        change = (whole.sums[:4] - without.sums[:4]).tolist()
        norm = sum(Fraction(value) ** 2 for value in change) / Fraction(4) ** rule.bits
        assert norm <= Fraction(clip_norm) ** 2


def test_the_mean_is_of_clipped_deltas_over_the_expected_cohort() -> None:
    deltas = random_deltas(5, 0.1)
    deltas[0] *= 1e-3
    aggregation = aggregation_of(make_rule())
    for client, delta in enumerate(deltas):
        aggregation.add(make_update(delta, client=client, weight=10 + client))
    norms = deltas.double().norm(dim=1, keepdim=True)
    assert norms.min() < 1 < norms[1:].min()
    expected = (deltas.double() * (1 / norms).clamp(max=1.0)).sum(dim=0) / COHORT
    result = total_of(aggregation)
    torch.testing.assert_close(result.mean.double(), expected, rtol=2e-6, atol=1e-12)
    assert result.train_loss == 1.0


def test_a_rejected_delta_counts_as_zero_and_the_denominator_stays() -> None:
    delta = random_deltas(1, 0.001)[0]
    alone, beside = aggregation_of(make_rule()), aggregation_of(make_rule())
    for aggregation in (alone, beside):
        aggregation.add(make_update(delta))
    beside.add(make_update(torch.full((P,), math.nan), client=7))
    assert beside.rejected_clients() == [7]
    first, second = total_of(alone), total_of(beside)
    assert torch.equal(first.mean, second.mean)
    assert second.num_rejected == 1


def test_an_empty_cohort_is_a_step_of_noise_of_the_right_size() -> None:
    size = 200_000
    rule = make_rule(noise=2.5, clip_norm=0.3)
    means = [total_of(aggregation_of(rule, size), number).mean.double() for number in range(2)]
    deviation = 2.5 * 0.3 / COHORT
    for mean in means:
        assert abs(mean.mean()) < 5 * deviation / math.sqrt(size)
        assert abs(mean.std() / deviation - 1) < 5 / math.sqrt(2 * size)
    assert abs(torch.corrcoef(torch.stack(means))[0, 1]) < 5 / math.sqrt(size), "each round has noise of its own"
    assert torch.equal(total_of(aggregation_of(rule, size)).mean.double(), means[0])


def test_only_rank_0_adds_noise() -> None:
    rule = make_rule(noise=1.0)
    alone = total_of(aggregation_of(rule), 3).mean
    assert torch.equal(total_on_rank(0, aggregation_of(rule), 3).mean, alone)
    assert total_on_rank(1, aggregation_of(rule), 3).mean.abs().max() == 0


def test_secure_noise_is_another_each_time() -> None:
    first, second = (total_of(aggregation_of(make_rule(noise=1.0, secure_noise=True))).mean for _ in range(2))
    assert not torch.equal(first, second)


def test_the_largest_cohort_and_noise_fit() -> None:
    rule = make_rule(noise=20.0, population=1000)
    aggregation = aggregation_of(rule, size=1)
    for client in range(1000):
        aggregation.add(make_update([1023.0], client=client))
    aggregation.sums[0] += round(10 * 20.0 * 2**rule.bits)
    assert 0 < int(aggregation.sums[0]) <= 2**62
    mean = float(aggregation.total(aggregation.sums).mean)
    assert mean == pytest.approx((1000 + 200) / COHORT, rel=1e-5)


@pytest.mark.parametrize("start", [0.01, 40.0])
def test_the_clip_norm_finds_the_quantile(start: float) -> None:
    """Andrew et al.'s update: from far below and far above, with a noisy count, to the norm that 70 % stay below."""
    rule = make_rule(clip_norm=start, count_noise=0.4, population=COHORT, adaptive={"quantile": 0.7, "lr": 0.2})
    sizes = torch.linspace(0.5, 1.5, COHORT)
    found = []
    for number in range(300):
        aggregation = aggregation_of(rule)
        for client, norm in enumerate(sizes):
            delta = torch.zeros(P)
            delta[number % P] = norm
            aggregation.add(make_update(delta, client=client))
        rule = replace(rule, clip_norm=rule.next_clip_norm(total_of(aggregation, number).extra))
        found.append(rule.clip_norm)
    settled = torch.tensor(found[100:])
    assert 1.1 < settled.mean() < 1.35, "between the fifth and the seventh of eight norms"


def test_the_count_is_noisy_and_exact_without_noise() -> None:
    def step(count_noise: float | None, number: int = 0) -> float:
        rule = make_rule(count_noise=count_noise, population=COHORT, adaptive={"quantile": 0.5, "lr": 1.0})
        aggregation = aggregation_of(rule)
        for client in range(COHORT):
            aggregation.add(make_update(torch.full((P,), 1.0 if client < 2 else 1e-4), client=client))
        return rule.next_clip_norm(total_of(aggregation, number).extra)

    share = 6 / COHORT
    assert step(None) == pytest.approx(math.exp(-(share - 0.5)), rel=1e-12)
    noise = torch.tensor([-math.log(step(1.5, number)) + 0.5 - share for number in range(400)]) * COHORT
    assert abs(noise.mean()) < 5 * 1.5 / math.sqrt(400)
    assert abs(noise.std() / 1.5 - 1) < 5 / math.sqrt(2 * 400)


def test_a_rejected_delta_is_not_counted_among_the_clipped_or_unclipped() -> None:
    aggregation = aggregation_of(make_rule())
    aggregation.add(make_update(torch.full((P,), math.nan)))
    assert total_of(aggregation).extra == 0


def test_the_clip_norm_stays_unless_it_is_adaptive() -> None:
    rule = make_rule(clip_norm=0.3)
    aggregation = aggregation_of(rule)
    aggregation.add(make_update(torch.full((P,), 1e-4)))
    assert rule.next_clip_norm(total_of(aggregation).extra) == 0.3


def test_a_round_that_is_dropped_leaves_the_clip_norm() -> None:
    """The next norm is a new value, so nothing has to be taken back."""
    rule = make_rule(count_noise=0.4, adaptive={"quantile": 0.5, "lr": 1.0})
    aggregation = aggregation_of(rule)
    aggregation.add(make_update(torch.full((P,), 1e-4)))
    assert rule.next_clip_norm(total_of(aggregation).extra) != 1.0
    assert rule.clip_norm == 1.0
    assert dict(aggregation.state.algorithm) == {}
