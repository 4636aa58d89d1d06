"""Exact aggregation against arithmetic on Python's unbounded integers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedpeft_dist.federation.aggregation import (
    DELTA_LIMIT,
    Aggregation,
    RoundTotal,
    WeightedMean,
    fraction_bits,
    quantize,
)
from tests.aggregation_fixtures import make_aggregation
from tests.aggregation_fixtures import make_update as update

P = 3
BELOW_LIMIT = float(np.nextafter(np.float32(1024), np.float32(0)))
deltas = st.lists(
    st.floats(-1024, 1024, exclude_min=True, exclude_max=True, width=32, allow_subnormal=True), min_size=P, max_size=P
)
losses = st.floats(0, 2000, width=32)
cohorts = st.lists(st.tuples(st.integers(0, 2**20), deltas, losses), min_size=1, max_size=8)


def aggregation_of(largest_total_weight: int) -> Aggregation:
    return make_aggregation(P, largest_total_weight, WeightedMean(fraction_bits(largest_total_weight)))


def total_of(aggregation: Aggregation) -> RoundTotal:
    """The round's total where there is one rank."""
    return aggregation.total(aggregation.sums)


def exact_sum(cohort: list[tuple[int, list[float], float]], bits: int) -> list[int]:
    """sum of weight * round_half_even(delta * 2^s); `round` of a Fraction is exact and half-even."""
    return [sum(weight * round(Fraction(delta[i]) * 2**bits) for weight, delta, _ in cohort) for i in range(P)]


@pytest.mark.parametrize("largest", [*range(1, 70), 2**10, 2**20 - 1, 2**20, 2**20 + 1, 2**31, 2**40 + 1])
def test_fraction_bits(largest: int) -> None:
    ceil_log2 = (largest - 1).bit_length()
    assert fraction_bits(largest) == 62 - 10 - ceil_log2
    assert largest * 1024 * 2 ** fraction_bits(largest) <= 2**62


def test_no_weight_at_all_has_bits_too() -> None:
    assert fraction_bits(0) == 52


def test_quantize_rounds_halves_to_even() -> None:
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.25, 0.75], dtype=torch.float64)
    assert quantize(values, 0).tolist() == [0, 2, 2, 0, -2, 0, 1]
    assert quantize(values, 1).tolist() == [1, 3, 5, -1, -3, 0, 2]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(cohort=cohorts, num_ranks=st.integers(1, 4), randomness=st.randoms(use_true_random=False))
@example(cohort=[(1, [2.0**-50, 2.0**-53, 3 * 2.0**-53], 0.0)], num_ranks=1, randomness=None)
def test_the_sum_is_exact_in_any_order_and_over_any_ranks(cohort, num_ranks, randomness) -> None:
    """Updates in any order, over any number of ranks whose int64 sums are then added."""
    largest = sum(weight for weight, _, _ in cohort)
    bits = fraction_bits(largest)
    expected = exact_sum(cohort, bits)

    in_order = aggregation_of(largest)
    for weight, delta, loss in cohort:
        in_order.add(update(delta, weight, loss, num_samples=weight))
    assert in_order.sums[:P].tolist() == expected

    ranks = [aggregation_of(largest) for _ in range(num_ranks)]
    shuffled = list(cohort)
    if randomness is not None:
        randomness.shuffle(shuffled)
    for weight, delta, loss in shuffled:
        rank = randomness.randrange(num_ranks) if randomness is not None else 0
        ranks[rank].add(update(delta, weight, loss, num_samples=weight))
    together = sum(rank.sums for rank in ranks)
    assert torch.equal(together, in_order.sums)

    first, second = total_of(in_order), in_order.total(together)
    assert (first.mean is None) == (largest == 0)
    if first.mean is not None:
        assert torch.equal(first.mean, second.mean)
        assert first.train_loss == second.train_loss
    assert first.num_samples == second.num_samples == largest


@settings(deadline=None, derandomize=True, max_examples=100)
@given(cohort=cohorts)
def test_the_mean_is_within_a_quantum_of_the_exact_one(cohort) -> None:
    largest = sum(weight for weight, _, _ in cohort)
    if largest == 0:
        return
    aggregation = aggregation_of(largest)
    for weight, delta, loss in cohort:
        aggregation.add(update(delta, weight, loss, num_samples=0))
    result = total_of(aggregation)
    weights = np.array([weight for weight, _, _ in cohort], dtype=np.float64)
    mean = weights @ np.array([delta for _, delta, _ in cohort], dtype=np.float64) / largest
    quantum = 2.0 ** -fraction_bits(largest)
    to_float32 = np.abs(mean) * 2.0**-24 + 2.0**-149
    float64_sum = 1024 * len(cohort) * 2.0**-52
    assert (np.abs(result.mean.double().numpy() - mean) <= quantum + to_float32 + float64_sum).all()
    loss = weights @ np.array([min(loss, 1024.0) for _, _, loss in cohort]) / largest
    assert abs(result.train_loss - loss) <= quantum + float64_sum


@pytest.mark.parametrize("weight", [1, 2, 3, 2**20 - 1, 2**20, 2**20 + 1, 2**31, 2**40 + 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_deltas_with_the_largest_weights_do_not_overflow(weight: int, sign: int) -> None:
    aggregation = aggregation_of(weight)
    aggregation.add(update([sign * BELOW_LIMIT] * P, weight, loss=1e30, num_samples=0))
    exact = sign * weight * round(Fraction(BELOW_LIMIT) * 2**aggregation.rule.bits)
    assert abs(exact) < 2**63
    assert aggregation.sums[:P].tolist() == [exact] * P
    result = total_of(aggregation)
    assert result.num_rejected == 0
    assert result.mean.tolist() == [exact / (weight * 2**aggregation.rule.bits)] * P
    assert result.train_loss == 1024.0


def test_many_clients_of_the_largest_deltas_do_not_overflow() -> None:
    weights = [997] * 1000 + [4000]
    aggregation = aggregation_of(sum(weights))
    for weight in weights:
        aggregation.add(update([BELOW_LIMIT, -BELOW_LIMIT, 0.0], weight, loss=BELOW_LIMIT, num_samples=0))
    quantum = sum(weights) * round(Fraction(BELOW_LIMIT) * 2**aggregation.rule.bits)
    assert aggregation.sums[:P].tolist() == [quantum, -quantum, 0]
    assert total_of(aggregation).mean.tolist() == [BELOW_LIMIT, -BELOW_LIMIT, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, DELTA_LIMIT, -DELTA_LIMIT, 3e38])
def test_a_rejected_client_leaves_no_trace_but_its_count(bad: float) -> None:
    aggregation = aggregation_of(100)
    aggregation.add(update([1.0, -2.0, 0.5], 3, loss=0.25, client=4, num_samples=3))
    aggregation.add(update([0.0, bad, 1.0], 60, loss=7.0, client=5, num_samples=60))
    aggregation.add(update([0.0, 5.0, 1.5], 1, loss=0.75, client=9, num_samples=1))
    assert aggregation.rejected_clients() == [5]
    result = total_of(aggregation)
    assert result.num_rejected == 1
    assert result.num_samples == 64
    assert result.mean.tolist() == [0.75, -0.25, 0.75]
    assert result.train_loss == 0.375


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_rejects_nobody(loss: float) -> None:
    """Whom to reject follows from what clients send, which their losses are no part of."""
    aggregation = aggregation_of(2)
    aggregation.add(update([1.0] * P, 1, loss=loss, client=2, num_samples=1))
    aggregation.add(update([3.0] * P, 1, loss=1.0, client=3, num_samples=1))
    assert aggregation.rejected_clients() == []
    result = total_of(aggregation)
    assert result.mean.tolist() == [2.0] * P
    assert result.train_loss == (DELTA_LIMIT + 1.0) / 2


def test_a_round_without_weight_has_no_mean() -> None:
    aggregation = aggregation_of(10)
    aggregation.add(update([math.nan] * P, 10, num_samples=10))
    aggregation.add(update([1.0] * P, 0, num_samples=0))
    result = total_of(aggregation)
    assert result.mean is None
    assert result.train_loss is None
    assert result.num_rejected == 1


def test_each_round_starts_at_zero() -> None:
    before = aggregation_of(10)
    before.add(update([5.0] * P, 10, loss=2.0, num_samples=10))
    before.add(update([math.inf] * P, 10, client=8, num_samples=10))
    assert total_of(before).num_rejected == 1
    aggregation = Aggregation(before.algorithm, before.state, 1.0, 10, before.rule)
    assert aggregation.rejected_clients() == []
    aggregation.add(update([1.0] * P, 2, loss=1.0, num_samples=7))
    result = total_of(aggregation)
    assert result.mean.tolist() == [1.0] * P
    assert (result.num_rejected, result.num_samples, result.train_loss) == (0, 7, 1.0)


def test_the_mean_is_no_view_of_the_sums() -> None:
    aggregation = aggregation_of(1)
    aggregation.add(update([1.0, 2.0, 3.0], num_samples=1))
    mean = total_of(aggregation).mean
    aggregation.add(update([9.0] * P, num_samples=1))
    assert mean.tolist() == [1.0, 2.0, 3.0]
    assert mean.dtype == torch.float32
