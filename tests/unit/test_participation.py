"""Participation: selected, lost, late and counted clients, and the simulated time of a round."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections import Counter
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.participation.course import LocalWork
from fedpeft_dist.participation.plan import Participation
from tests.participation_fixtures import AVAILABILITY, DEVICES, DROPOUT, make_participation, write_trace

NUM_ERRORS = 5
"""Standard errors by which a frequency may differ."""
CLIENT = {"epochs": 1, "batch_size": 8}


def cohorts(participation: Participation, rounds: int) -> list[tuple[int, ...]]:
    return [tuple(participation.plan(number).steps) for number in range(rounds)]


def assert_frequency(count: int, tries: int, probability: float) -> None:
    error = math.sqrt(tries * probability * (1 - probability))
    assert abs(count - tries * probability) <= NUM_ERRORS * error, (count, tries, probability)


# --- uniform -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("population", "cohort"), [(1, 1), (8, 8), (10, 3), (10**9, 50)])
def test_a_cohort_holds_distinct_clients_of_the_population(population: int, cohort: int) -> None:
    for clients in cohorts(make_participation(population, cohort), 20):
        assert len(clients) == len(set(clients)) == cohort
        assert list(clients) == sorted(clients)
        assert all(type(client) is int and 0 <= client < population for client in clients)


@pytest.mark.parametrize(("population", "cohort"), [(8, 8), (64, 8), (10**6, 50)])
def test_uniform_cohorts_equal_a_plain_draw(population: int, cohort: int) -> None:
    """The draw stays as it has always been, so the results of runs do not change."""
    expected = [
        tuple(sorted(random.Random(derive_seed(3, "cohort", number)).sample(range(population), cohort)))
        for number in range(20)
    ]
    assert cohorts(make_participation(population, cohort, seed=3), 20) == expected


def test_clients_and_pairs_of_clients_are_drawn_equally_often() -> None:
    population, cohort, rounds = 12, 4, 4000
    singles, pairs = Counter(), Counter()
    for clients in cohorts(make_participation(population, cohort, seed=7), rounds):
        singles.update(clients)
        pairs.update(combinations(clients, 2))
    expected = rounds * cohort / population
    statistic = sum((singles[c] - expected) ** 2 / expected for c in range(population))
    # Without replacement counts vary less than a multinomial's, by (N - M) / (N - 1).
    statistic *= (population - 1) / (population - cohort)
    assert 1e-4 < chi2.sf(statistic, population - 1) < 1 - 1e-4
    assert len(pairs) == population * (population - 1) // 2
    for count in pairs.values():
        assert_frequency(count, rounds, cohort * (cohort - 1) / (population * (population - 1)))


def test_a_billion_clients_cost_no_memory() -> None:
    participation = make_participation(10**9, 1000)
    participation.plan(0)
    tracemalloc.start()
    try:
        participation.plan(1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


# --- poisson, weighted -------------------------------------------------------------------------------------------


def test_poisson_draws_each_client_independently() -> None:
    population, cohort, rounds = 10, 3, 6000
    drawn = cohorts(make_participation(population, cohort, name="poisson"), rounds)
    q, sizes, pairs = cohort / population, Counter(map(len, drawn)), Counter()
    for clients in drawn:
        pairs.update(combinations(clients, 2))
    for pair in combinations(range(population), 2):
        assert_frequency(pairs[pair], rounds, q * q)  # without replacement it would be q * 2 / 9
    for size in range(population + 1):
        probability = math.comb(population, size) * q**size * (1 - q) ** (population - size)
        assert_frequency(sizes[size], rounds, probability)


def test_weighted_draws_one_after_another_in_proportion_to_size() -> None:
    """Every ordered pair has its frequency, whether the draw ends early or goes on."""
    sizes, rounds = [1, 2, 0, 3, 10], 6000
    participation = make_participation(sizes, 2, name="weighted")
    counts = Counter(tuple(participation.select(number).tolist()) for number in range(rounds))
    for a, b in permutations([0, 1, 3, 4], 2):
        assert_frequency(counts[a, b], rounds, sizes[a] / 16 * sizes[b] / (16 - sizes[a]))
    assert sum(counts.values()) == rounds


def test_weighted_finishes_if_one_client_holds_nearly_everything() -> None:
    """Repeated draws would nearly always find this client. The others still come in proportion to their samples."""
    sizes, rounds = [10**9, *range(1, 101)], 1500
    participation = make_participation(sizes, 3, name="weighted")
    selected = [participation.select(number).tolist() for number in range(rounds)]
    assert all(clients[0] == 0 and len(set(clients)) == 3 for clients in selected)
    large = sum(clients[1] > 50 for clients in selected)
    assert_frequency(large, rounds, sum(range(51, 101)) / sum(range(1, 101)))


def test_largest_weight_bounds_a_rounds_weights() -> None:
    sizes = [5, 1, 7, 3]
    assert make_participation(sizes, 2).largest_weight == 12
    assert make_participation(sizes, 2, over_selection=2.0).largest_weight == 12
    assert make_participation(sizes, 2, name="poisson").largest_weight == 16


# --- clients without samples -------------------------------------------------------------------------------------

HOLDERS = [8 * (1 + n % 5) if n % 3 == 1 else 0 for n in range(60)]
"""20 of 60 clients have samples: 1, 4, 7, ..."""
CONDITIONS = {
    "uniform": {},
    "poisson": {"name": "poisson"},
    "weighted": {"name": "weighted"},
    "over-selected": {"over_selection": 1.5},
    "on and off": {"availability": {"name": "on_off", "share": 0.6}},
    "by day": {"name": "poisson", "availability": {"name": "diurnal"}},
    "lost": {"dropout": {"name": "random", "before": 0.2, "during": 0.2, "after": 0.2}},
    "late": {"over_selection": 2.0, "devices": {"name": "lognormal"}, "deadline": 0.2, "late": "partial"},
    "late, weighted": {"name": "weighted", "devices": {"name": "lognormal"}, "deadline": 0.2},
}


@pytest.mark.parametrize(
    ("condition", "privacy"),
    [
        *((condition, None) for condition in CONDITIONS),
        *((condition, "sample") for condition, keys in CONDITIONS.items() if "over_selection" not in keys),
        *((condition, "user") for condition in ("uniform", "poisson", "on and off", "by day", "lost")),
    ],
)
def test_a_client_without_samples_is_never_selected(condition: str, privacy: str | None) -> None:
    section = None if privacy is None else {"name": privacy, "noise_multiplier": 1.0}
    if privacy == "user" and CONDITIONS[condition].get("name") != "poisson":
        section["sampling"] = "without_replacement"
    participation = make_participation(HOLDERS, 8, client=CLIENT, privacy=section, **CONDITIONS[condition])
    participation.check()
    seen = set()
    for number in range(60):
        selected, plan = participation.select(number), participation.plan(number)
        seen |= set(selected.tolist())
        assert all(steps > 0 for steps in plan.steps.values())
        assert set(plan.steps) <= set(selected.tolist())
        if CONDITIONS[condition].get("name") != "poisson" and "availability" not in CONDITIONS[condition]:
            assert len(selected) == participation.num_selected
    assert seen == set(range(1, 60, 3)), "every client with samples is selected"


@pytest.mark.parametrize("name", ["uniform", "poisson"])
def test_clients_without_samples_do_not_change_the_draw(name: str) -> None:
    among_others = make_participation(HOLDERS, 8, name=name)
    alone = make_participation([size for size in HOLDERS if size], 8, name=name)
    for number in range(20):
        assert among_others.select(number).tolist() == (1 + 3 * alone.select(number)).tolist()
    assert among_others.sampling_probability(0) == 8 / 20
    assert among_others.available(0) == 20
    assert among_others.describe() == "40 of 60 clients have no samples and are never selected"


def test_availability_counts_only_clients_with_samples() -> None:
    participation = make_participation(HOLDERS, 8, availability={"name": "on_off", "share": 0.5})
    for number in range(5):
        on = participation.availability.of(np.arange(60), number)
        assert participation.available(number) == on[1::3].sum()
    assert participation.describe() == (
        "40 of 60 clients have no samples and are never selected; 10 of the other 20 are available on average"
    )


# --- availability ------------------------------------------------------------------------------------------------


class Counting:
    """Counts the candidates that are asked whether they are available."""

    def __init__(self, share: float):
        self.share, self.most, self.asked = share, 0, 0

    def of(self, clients: np.ndarray, round_number: int) -> np.ndarray:
        self.asked += len(clients)
        return clients % 100 < 100 * self.share


@pytest.mark.parametrize("name", ["uniform", "poisson", "weighted"])
def test_only_a_few_candidates_are_asked_for_availability(name: str) -> None:
    population, cohort, rounds = 1_000_000, 32, 30
    participation = make_participation(population, cohort, name=name)
    participation.availability = Counting(0.25)
    for number in range(rounds):
        selected = participation.select(number)
        assert (selected % 100 < 25).all()
        assert len(set(selected.tolist())) == len(selected)
        assert name == "poisson" or len(selected) == cohort
    assert participation.availability.asked < 12 * cohort * rounds


@pytest.mark.parametrize("name", ["uniform", "weighted"])
@pytest.mark.parametrize("population", [40, 4000])
def test_finds_every_available_client(name: str, population: int) -> None:
    """The last of many clients is found, too. If fewer are available than wanted, all are selected."""
    participation = make_participation(population, 8, name=name)
    available = {1, 7, 11, 29, population - 1}
    participation.availability = Counting(1.0)
    participation.availability.of = lambda clients, number: np.isin(clients, list(available))
    for number in range(10):
        assert set(participation.select(number).tolist()) == available


@pytest.mark.parametrize("name", ["uniform", "weighted"])
def test_unavailable_clients_do_not_change_the_draw(name: str) -> None:
    sizes, rounds = [1, 50, 2, 50, 3, 50, 4, 50], 4000
    participation = make_participation(sizes, 1, name=name)
    participation.availability = Counting(1.0)
    participation.availability.of = lambda clients, number: clients % 2 == 0
    counts = Counter(int(participation.select(number)[0]) for number in range(rounds))
    for client in (0, 2, 4, 6):
        assert_frequency(counts[client], rounds, 1 / 4 if name == "uniform" else sizes[client] / 10)


def test_on_off_lasts_for_its_rounds_and_differs_between_clients() -> None:
    population, rounds = 3000, 40
    settings = {"name": "on_off", "share": 0.3, "spread": 0.2, "rounds": 5}
    availability = make_participation(population, 1, availability=settings).availability
    clients = np.arange(population)
    on = np.stack([availability.of(clients, number) for number in range(rounds)])
    # A client's own mean varies: by its share, uniform on 0.1 to 0.5, and by about eight stretches of drawing.
    assert abs(on.mean() - 0.3) < NUM_ERRORS * math.sqrt((0.4**2 / 12 + 0.3 * 0.7 / 8) / population)
    changes = on[1:] != on[:-1]
    share = 2 * (0.3 * 0.7 - 0.4**2 / 12)  # two draws of one client differ
    assert abs(changes.mean() - share / 5) < 0.01
    assert np.abs(changes.mean(axis=1) - share / 5).max() < 0.03, "clients change at rounds of their own"
    often = on.mean(axis=0)
    assert often[: population // 2].std() > math.sqrt(0.3 * 0.7 / 8) * 1.05


def test_diurnal_follows_the_time_of_day() -> None:
    population, clients = 4000, np.arange(4000)
    one_zone = {"name": "diurnal", "low": 0.1, "high": 0.7, "spread": 0.0}
    availability = make_participation(population, 1, availability=one_zone, seconds_per_round=21600.0).availability
    for number, probability in enumerate([0.1, 0.4, 0.7, 0.4, 0.1, 0.4]):
        assert_frequency(int(availability.of(clients, number).sum()), population, probability)
    around_the_world = {**one_zone, "spread": 1.0}
    spread = make_participation(population, 1, availability=around_the_world, seconds_per_round=21600.0).availability
    assert spread.share == pytest.approx(0.4)
    on = np.stack([spread.of(clients, number) for number in range(8)])
    for row in on:
        assert_frequency(int(row.sum()), population, 0.4)
    # Each client has its own day: if it is on in a round, it is on a day later more often than half a day later.
    assert (on[0] & on[4]).mean() > (on[0] & on[2]).mean() + 0.05


def test_a_trace_is_read_at_the_start_of_each_round_and_begins_again(tmp_path: Path) -> None:
    rows = [(1, 0, 100, 0), (0, 30, 100, 0), (0, 0, 30, 1), (2, 50, 100, 1), (2, 0, 50, 0)]
    path = write_trace(tmp_path / "a.csv", AVAILABILITY, rows)
    participation = make_participation(3, 1, availability={"name": "trace", "path": path}, seconds_per_round=10.0)
    found = [participation.select(number).tolist() for number in range(20)]
    assert found == 2 * [*3 * [[0]], *2 * [[]], *5 * [[2]]]
    assert participation.availability.most == 1
    assert participation.availability.share == pytest.approx(80 / 300)
    assert participation.describe() == "0.8 of 3 clients are available on average"


# --- dropout -----------------------------------------------------------------------------------------------------


def test_dropout_has_its_probabilities() -> None:
    clients, rounds = np.arange(500), 40
    dropout = make_participation(500, 1, dropout={"name": "random", "before": 0.1, "during": 0.2, "after": 0.3}).dropout
    progress = np.concatenate([dropout.progress(clients, number) for number in range(rounds)])
    during = progress[(progress > 0) & (progress < 1)]
    for found, probability in (((progress == 0).sum(), 0.1), (len(during), 0.2), ((progress == 1).sum(), 0.3)):
        assert_frequency(int(found), clients.size * rounds, probability)
    assert abs(during.mean() - 0.5) < NUM_ERRORS * math.sqrt(1 / 12 / len(during))
    assert np.isinf(progress).mean() == pytest.approx(0.4, abs=0.02)


def test_a_dropout_trace_decides_who_is_lost_and_when(tmp_path: Path) -> None:
    rows = [(2, 1, "after"), (1, 0, "before"), (2, 3, "during"), (1, 3, " after")]
    path = write_trace(tmp_path / "d.csv", DROPOUT, rows)
    participation = make_participation(4, 4, dropout={"name": "trace", "path": path})
    clients = np.arange(4)
    first, second, third = (participation.dropout.progress(clients, number).tolist() for number in range(3))
    assert first == [0, math.inf, math.inf, 1]
    assert second[:3] == [math.inf, 1, math.inf]
    assert 0 < second[3] < 1
    assert third == [math.inf] * 4
    assert [list(participation.plan(number).steps) for number in range(3)] == [[1, 2], [0, 2], [0, 1, 2, 3]]


def test_nobody_is_lost_without_dropout() -> None:
    assert np.isinf(make_participation(4, 4).dropout.progress(np.arange(4), 0)).all()


# --- local work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [1, 7, 8, 9, 24, 30])
@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_work_is_counted_batch_by_batch(num_samples: int, num_steps: int) -> None:
    work = LocalWork(num_samples, 8, num_steps)
    epoch = [min(8, num_samples - start) for start in range(0, num_samples, 8)]
    done = np.cumsum([0, *(epoch[step % len(epoch)] for step in range(num_steps))])
    assert [work.samples(steps) for steps in range(num_steps + 1)] == done.tolist()
    for seconds in np.arange(-0.5, done[-1] / 4 + 1, 0.25):  # exact in binary
        assert work.steps_within(float(seconds), 4.0) == max(0, int((done <= seconds * 4).sum()) - 1)


def test_a_client_without_samples_has_no_work() -> None:
    assert LocalWork(0, 8, 0).samples(0) == LocalWork(0, 8, 0).steps_within(1.0, 2.0) == 0


# --- plans -------------------------------------------------------------------------------------------------------

# 3 local steps of 8 samples (0.5 s each at 16 a second), 1,000 bytes each way.
BYTES = 1000


@pytest.fixture
def devices(tmp_path: Path) -> dict[str, str]:
    """Clients 0 to 5 need 2, 3, 4, 5, 6 and 7 s: 1 s to receive, 3 steps, and the rest to send."""
    rows = [(0, 48, 2000, 1000), *((n, 24 / (n + 0.5), 2000, 1000) for n in range(1, 6))]
    return {"name": "trace", "path": write_trace(tmp_path / "devices.csv", DEVICES, rows)}


def make_slow(devices: dict[str, str], cohort: int = 6, **settings) -> Participation:
    participation = make_participation(
        [24] * 6, cohort, client=CLIENT, bytes_per_client=BYTES, devices=devices, **settings
    )
    participation.check()
    return participation


def test_a_round_lasts_as_long_as_its_slowest_client(devices: dict[str, str]) -> None:
    plan = make_slow(devices).plan(0)
    assert plan.steps == dict.fromkeys(range(6), 3)
    assert (plan.seconds, plan.wasted_samples, plan.late) == (7.0, 0, 0)


def test_random_batches_take_their_average_time(tmp_path: Path) -> None:
    """Under sample-level privacy every step draws 8 of the 20 samples on average, so no batch is short."""
    trace = write_trace(tmp_path / "devices.csv", DEVICES, [(client, 16, 1000, 1000) for client in range(3)])
    settings = {"client": CLIENT, "bytes_per_client": BYTES, "devices": {"name": "trace", "path": trace}}
    private = {"privacy": {"name": "sample", "noise_multiplier": 1.0}}
    plans = [make_participation([20, 3, 0], 2, **settings, **own).plan(0) for own in ({}, private)]
    assert plans[0].steps == plans[1].steps == {0: 3, 1: 1}
    assert [plan.seconds for plan in plans] == [2 + 20 / 16, 2 + 24 / 16]


def test_late_clients_are_dropped_at_the_deadline(devices: dict[str, str]) -> None:
    plan = make_slow(devices, deadline=4.0).plan(0)
    assert plan.steps == {0: 3, 1: 3, 2: 3}
    assert (plan.selected, plan.late, plan.partial, plan.seconds) == (6, 3, 0, 4.0)
    # In the 3 s after receiving, clients 3, 4 and 5 end two, two and one steps of 3.5 / 3, 4.5 / 3 and 5.5 / 3 s.
    assert plan.wasted_samples == 16 + 16 + 8


def test_partial_work_fits_before_the_deadline(devices: dict[str, str]) -> None:
    plan = make_slow(devices, deadline=4.0, late="partial").plan(0)
    # Clients 3, 4 and 5 have 2.5 s for steps of 3.5 / 3, 4.5 / 3 and 5.5 / 3 s.
    assert plan.steps == {0: 3, 1: 3, 2: 3, 3: 2, 4: 1, 5: 1}
    assert (plan.late, plan.partial, plan.wasted_samples) == (0, 3, 0)
    assert 3.0 < plan.seconds <= 4.0
    plan = make_slow(devices, deadline=2.5, late="partial").plan(0)
    assert plan.steps == {0: 3, 1: 2, 2: 1}
    assert (plan.late, plan.partial, plan.seconds) == (3, 2, 2.5)


def test_the_first_to_report_count(devices: dict[str, str]) -> None:
    plan = make_slow(devices, cohort=3, over_selection=2.0).plan(0)
    assert plan.steps == {0: 3, 1: 3, 2: 3}
    assert (plan.selected, plan.surplus, plan.seconds) == (6, 3, 4.0)
    assert plan.wasted_samples == 16 + 16 + 8


def test_without_devices_the_first_to_report_are_the_first_drawn() -> None:
    participation = make_participation(1000, 10, over_selection=1.35)
    for number in range(20):
        plan, selected = participation.plan(number), participation.select(number)
        assert list(plan.steps) == sorted(selected[:10].tolist())
        assert (plan.selected, plan.surplus, plan.seconds) == (14, 4, None)


def test_over_selection_rounds_up_to_the_next_client() -> None:
    for factor, cohort, selected in ((1.1, 10, 11), (1.3, 10, 13), (1.01, 10, 11), (1.0, 7, 7), (1.5, 5, 8)):
        assert make_participation(100, cohort, over_selection=factor).num_selected == selected


def test_over_selection_replaces_lost_clients(devices: dict[str, str], tmp_path: Path) -> None:
    rows = [(1, 0, "before"), (1, 1, "after"), (2, 0, "before"), (2, 1, "after"), (2, 2, "after"), (2, 3, "after")]
    path = write_trace(tmp_path / "dropout.csv", DROPOUT, rows)
    settings = {"cohort": 3, "over_selection": 2.0, "dropout": {"name": "trace", "path": path}}
    first, second = (make_slow(devices, **settings).plan(number) for number in range(2))
    assert first.steps == {2: 3, 3: 3, 4: 3}
    assert (first.dropped, first.surplus, first.seconds, first.wasted_samples) == (2, 1, 6.0, 0 + 24 + 16)
    # Too few clients are left. Without a deadline the server waits for the losses, with one until the deadline.
    assert second.steps == {4: 3, 5: 3}
    assert (second.dropped, second.surplus, second.seconds) == (4, 0, 7.0)
    assert make_slow(devices, deadline=50.0, **settings).plan(1).seconds == 50.0


def test_a_cohort_that_loses_everyone(devices: dict[str, str]) -> None:
    everyone = {"name": "random", "before": 1.0}
    plan = make_slow(devices, dropout=everyone).plan(0)
    assert (plan.steps, plan.selected, plan.dropped, plan.seconds, plan.wasted_samples) == ({}, 6, 6, 1.0, 0)
    plan = make_slow(devices, dropout={"name": "random", "after": 1.0}, deadline=6.5).plan(0)
    assert (plan.steps, plan.seconds, plan.wasted_samples) == ({}, 6.5, 6 * 24)


def test_a_round_that_selects_nobody() -> None:
    plan = make_participation(10**6, 1, seed=3, name="poisson").plan(1)
    plans = [make_participation(10**6, 1, name="poisson").plan(number) for number in range(20)]
    plan = next(plan for plan in plans if not plan.selected)
    assert (plan.steps, plan.dropped, plan.seconds) == ({}, 0, None)


EVERYTHING = {
    "over_selection": 1.5,
    "availability": {"name": "diurnal"},
    "dropout": {"name": "random", "before": 0.1, "during": 0.1, "after": 0.1},
    "devices": {"name": "lognormal", "samples_per_second": 10.0},
    "deadline": 3.0,
    "late": "partial",
}


@pytest.mark.parametrize("settings", [{}, EVERYTHING, EVERYTHING | {"name": "weighted"}, {"name": "poisson"}])
def test_a_plan_is_a_function_of_config_seed_and_round(settings: dict) -> None:
    def make(seed: int) -> Participation:
        return make_participation([8 * (1 + n % 9) for n in range(1000)], 20, seed=seed, client=CLIENT, **settings)

    one = make(1)
    forwards = [one.plan(number) for number in range(30)]
    assert [one.plan(number) for number in reversed(range(30))] == forwards[::-1]
    assert [make(1).plan(number) for number in range(30)] == forwards
    found = {tuple(plan.steps) for plan in forwards}
    assert len(found) == 30
    assert not found & {tuple(make(2).plan(number).steps) for number in range(30)}


def test_every_selected_client_is_counted_once() -> None:
    participation = make_participation([8 * (1 + n % 9) for n in range(1000)], 20, client=CLIENT, **EVERYTHING)
    plans = [participation.plan(number) for number in range(200)]
    for plan in plans:
        assert plan.selected == 30 == plan.cohort + plan.dropped + plan.late + plan.surplus
        assert plan.cohort <= 20
        assert 0 <= plan.partial <= plan.cohort
        assert 0 < plan.seconds <= 3.0
        assert all(steps >= 1 for steps in plan.steps.values())
    for name in ("dropped", "late", "surplus", "partial", "wasted_samples"):
        assert any(getattr(plan, name) for plan in plans), name


def test_lognormal_devices_have_their_medians_and_spreads() -> None:
    settings = {"name": "lognormal", "samples_per_second": 20.0, "compute_sigma": 0.5, "bandwidth_sigma": 1.5}
    devices = make_participation(20_000, 1, devices=settings).devices
    for speeds, median, sigma in (
        (devices.samples_per_second, 20.0, 0.5),
        (devices.uplink_bytes_per_second, 1.0e6, 1.5),
        (devices.downlink_bytes_per_second, 4.0e6, 1.5),
    ):
        logs = np.log(speeds / median)
        assert abs(logs.mean()) < NUM_ERRORS * sigma / math.sqrt(20_000)
        assert abs(logs.std() / sigma - 1) < NUM_ERRORS / math.sqrt(2 * 20_000)
    ratio = devices.downlink_bytes_per_second / devices.uplink_bytes_per_second
    assert np.allclose(ratio, 4.0), "a client's link is slow both ways"
    correlation = np.corrcoef(np.log(devices.samples_per_second), np.log(devices.uplink_bytes_per_second))[0, 1]
    assert abs(correlation) < NUM_ERRORS / math.sqrt(20_000)


# --- refusals ----------------------------------------------------------------------------------------------------


def refusal(*arguments, **settings) -> str:
    with pytest.raises(ConfigError) as caught:
        make_participation(*arguments, **settings).check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refuses_to_select_more_clients_than_exist() -> None:
    message = refusal(10, 8, over_selection=1.5)
    assert "federation.participation.over_selection: 1.5 selects 12 clients of a population of 10" in message
    assert "at most 1.25" in message


def test_refuses_a_cohort_above_the_clients_with_samples() -> None:
    for name in ("uniform", "poisson", "weighted"):
        message = refusal([4, 0, 4], 3, name=name)
        assert "federation.cohort: 3 is larger than the 2 clients that have samples, of 3" in message
        assert "at most 2" in message
        make_participation([4, 0, 4], 2, name=name).check()
    assert "selects 3 clients of a population of 2" in refusal([4, 0, 4], 2, over_selection=1.5)


def test_refuses_a_cohort_above_the_clients_with_samples_available_at_once(tmp_path: Path) -> None:
    """Clients 0 and 1 are always available, client 2 never is, and client 0 has no samples."""
    path = write_trace(tmp_path / "a.csv", AVAILABILITY, [(0, 0, 9, 1), (1, 0, 9, 1), (2, 0, 9, 0)])
    availability = {"name": "trace", "path": path}
    assert "cohort: 2 is larger than the 1 clients that are ever available" in refusal(
        [0, 4, 4], 2, availability=availability
    )
    assert make_participation([0, 4, 4], 1, availability=availability).availability.share == pytest.approx(1 / 2)


@pytest.mark.parametrize(("late", "what"), [("drop", "all its local steps"), ("partial", "a single local step")])
def test_refuses_a_deadline_that_nobody_can_meet(devices: dict[str, str], late: str, what: str) -> None:
    fastest = 2.0 if late == "drop" else 1.0 + 1 / 6 + 0.5
    make_slow(devices, deadline=fastest + 1e-6, late=late)
    settings = {"client": CLIENT, "bytes_per_client": BYTES, "devices": devices, "late": late}
    message = refusal([24] * 6, 6, deadline=fastest - 1e-6, **settings)
    assert f"federation.participation.deadline: {fastest - 1e-6:g} seconds are met by no client" in message
    assert what in message
    assert f"{fastest:.4g} to receive 1,000 bytes" in message
    assert "met by no client" in refusal([0, *[24] * 5], 5, deadline=1.6, **settings), (
        "a client without samples does not count"
    )
