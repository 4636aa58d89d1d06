"""Who takes part in a round."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import pytest
from scipy.stats import chi2

from fedpeft_dist.config.schema import UniformParticipation
from fedpeft_dist.federation.participation import sample_cohort

UNIFORM = UniformParticipation(name="uniform")


@pytest.mark.parametrize(("population", "cohort"), [(1, 1), (8, 8), (10, 3), (10**9, 50)])
def test_a_cohort_is_distinct_clients_of_the_population(population: int, cohort: int) -> None:
    for round_number in range(20):
        clients = sample_cohort(UNIFORM, population, cohort, 1, round_number)
        assert len(clients) == len(set(clients)) == cohort
        assert all(isinstance(client, int) and 0 <= client < population for client in clients)


def test_a_cohort_is_a_function_of_seed_and_round() -> None:
    first = [sample_cohort(UNIFORM, 1000, 10, 1, round_number) for round_number in range(50)]
    backwards = [sample_cohort(UNIFORM, 1000, 10, 1, round_number) for round_number in reversed(range(50))]
    assert first == backwards[::-1]
    assert len({tuple(clients) for clients in first}) == 50
    other_seed = [sample_cohort(UNIFORM, 1000, 10, 2, round_number) for round_number in range(50)]
    assert not {tuple(clients) for clients in first} & {tuple(clients) for clients in other_seed}


def test_clients_and_pairs_of_clients_are_drawn_equally_often() -> None:
    population, cohort, rounds = 12, 4, 4000
    singles, pairs = Counter(), Counter()
    for round_number in range(rounds):
        clients = sample_cohort(UNIFORM, population, cohort, 7, round_number)
        singles.update(clients)
        pairs.update((a, b) for i, a in enumerate(clients) for b in clients[i + 1 :])
    expected = rounds * cohort / population
    statistic = sum((singles[c] - expected) ** 2 / expected for c in range(population))
    # Without replacement counts vary less than a multinomial's, by (N - M) / (N - 1).
    statistic *= (population - 1) / (population - cohort)
    assert 1e-4 < chi2.sf(statistic, population - 1) < 1 - 1e-4
    share = cohort * (cohort - 1) / (population * (population - 1))
    assert len(pairs) == population * (population - 1) // 2
    for count in pairs.values():
        assert abs(count - rounds * share) < 5 * (rounds * share * (1 - share)) ** 0.5


def test_a_billion_clients_cost_no_memory() -> None:
    sample_cohort(UNIFORM, 10, 5, 1, 0)
    tracemalloc.start()
    try:
        sample_cohort(UNIFORM, 10**9, 1000, 1, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
