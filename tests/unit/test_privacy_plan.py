"""Privacy plans: what a run releases, who spends how much, and when the budget ends."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import parse_config
from fedpeft_dist.data.partition import IndexPartition
from fedpeft_dist.federation.ahead import plan_privacy
from fedpeft_dist.lanes.wire import Traffic
from fedpeft_dist.participation.plan import Participation
from fedpeft_dist.participation.sampling import Draw, poisson_draw
from fedpeft_dist.privacy import accounting
from fedpeft_dist.privacy.plan import PrivacyPlan, make_privacy_plan

DELTA = 1e-3
SIZES = [10, 16, 40, 40, 64, 100, 200, 400]
ON_OFF = {"name": "on_off", "share": 0.6}


def participation_of(
    sizes: list[int] = SIZES,
    rounds: int = 6,
    cohort: int = 3,
    seed: int = 1,
    participation: dict | None = None,
    **privacy: Any,
) -> Participation:
    tree = {
        "seed": seed,
        "data": {"name": "synthetic", "clients": len(sizes), "partition": {"name": "iid"}},
        "federation": {"rounds": rounds, "cohort": cohort, "participation": participation or {}},
        "client": {"epochs": 2, "batch_size": 16},
        "privacy": privacy,
    }
    partition = IndexPartition(np.cumsum([0, *sizes]), torch.arange(sum(sizes)))
    made = Participation(parse_config(tree, "test"), partition, Traffic(4000, 4000))
    made.whole_config = parse_config(tree, "test")
    return made


def plan_of(noise_multipliers: torch.Tensor | None = None, **settings: Any) -> PrivacyPlan:
    participation = participation_of(**settings)
    return make_privacy_plan(participation.whole_config, participation, noise_multipliers)


def sample_plan(noise_multipliers: torch.Tensor | None = None, **settings: Any) -> PrivacyPlan:
    return plan_of(noise_multipliers, **{"name": "sample"} | settings)


def user_plan(noise_multipliers: torch.Tensor | None = None, **settings: Any) -> PrivacyPlan:
    participation = {"name": "poisson"} | settings.pop("participation", {})
    return plan_of(noise_multipliers, **{"name": "user", "participation": participation} | settings)


def steps_of(rounds: int, **settings: Any) -> Counter:
    """Each client's local steps, counted over the rounds' plans."""
    total, participation = Counter(), participation_of(**{"name": "sample", "noise_multiplier": 1.0} | settings)
    for number in range(rounds):
        total.update(participation.plan(number).steps)
    return total


def spent_by(client: int, noise: float, steps: int, accountant: str = "pld") -> float:
    event = accounting.gaussian_event(noise, min(1.0, 16 / SIZES[client]))
    return accounting.epsilon(((event, steps),), DELTA, accountant)


# --- samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_is_that_of_the_client_that_spends_most(accountant: str) -> None:
    plan = sample_plan(noise_multiplier=1.3, accountant=accountant)
    assert plan.num_rounds == 6
    assert plan.noise_multipliers.dtype == torch.float64
    assert set(plan.noise_multipliers.tolist()) <= {0.0, 1.3}
    spent = []
    for rounds in range(7):
        steps = steps_of(rounds)
        expected = max((spent_by(client, 1.3, count, accountant) for client, count in steps.items()), default=0.0)
        # Clients that surely spend less are skipped, although their coarser grids may give slightly more.
        assert expected * (1 - 2e-3) <= plan.epsilon(rounds) <= expected
        spent.append(plan.epsilon(rounds))
    assert spent == sorted(spent)
    assert spent[0] == 0.0 < spent[1]


def test_every_clients_noise_meets_the_target() -> None:
    plan, steps = sample_plan(epsilon=4.0, cohort=2), steps_of(6, cohort=2)
    assert 0 < len(steps) < len(SIZES), "the settings should leave a client out"
    for client in range(len(SIZES)):
        noise = float(plan.noise_multipliers[client])
        if client not in steps:
            assert noise == 0.0
            continue
        assert 0.98 * 4.0 < spent_by(client, noise, steps[client]) <= 4.0
    assert len(set(plan.noise_multipliers.tolist())) > 3
    assert 0.98 * 4.0 < plan.epsilon(6) <= 4.0
    spent = [plan.epsilon(rounds) for rounds in range(7)]
    assert spent == sorted(spent), "a client that takes part in one round has spent everything after it"


def test_late_and_lost_clients_release_nothing() -> None:
    lost = {"dropout": {"name": "random", "before": 0.5}}
    plan = sample_plan(noise_multiplier=1.0, participation=lost)
    steps = steps_of(6, participation=lost)
    assert sum(steps.values()) < sum(steps_of(6).values())
    expected = max(spent_by(client, 1.0, count) for client, count in steps.items())
    assert plan.epsilon(6) == pytest.approx(expected, rel=2e-3)
    nobody = {"dropout": {"name": "random", "after": 1.0}}
    silent = sample_plan(epsilon=1.0, participation=nobody)
    assert silent.epsilon(6) == 0.0
    assert silent.noise_multipliers.tolist() == [0.0] * len(SIZES)
    assert silent.figures(6)["noise_multiplier"] == 0.0


def test_a_client_without_samples_needs_no_noise() -> None:
    plan = sample_plan(sizes=[0, 32, 32], cohort=3, epsilon=2.0)
    assert plan.noise_multipliers[0] == 0.0
    assert 0.98 * 2.0 < plan.epsilon(6) <= 2.0


def test_figures_are_those_of_one_client_at_each_quantile_of_epsilon() -> None:
    plan, steps = sample_plan(epsilon=4.0, cohort=2), steps_of(6, cohort=2)
    figures = json.loads(json.dumps(plan.figures(6)))
    assert {key: figures[key] for key in ("name", "dp_delta", "accountant", "clip_norm")} == {
        "name": "sample",
        "dp_delta": DELTA,
        "accountant": "pld",
        "clip_norm": 1.0,
    }
    assert figures["epsilon"] == plan.epsilon(6)
    clients = figures["clients"]
    assert list(clients) == ["min", "p25", "median", "p75", "max"]
    assert set(clients["min"].values()) == {0}, "the client never takes part"
    assert clients["max"] == {key: figures[key] for key in clients["max"]}
    noise = plan.noise_multipliers[list(steps)]
    assert figures["ranges"]["noise_multiplier"] == [noise.min(), noise.max()]
    assert figures["ranges"]["steps"] == [min(steps.values()), max(steps.values())]
    shares = [min(1.0, 16 / SIZES[client]) for client in steps]
    assert figures["ranges"]["sampling_probability"] == [min(shares), max(shares)]


@pytest.mark.parametrize(
    "settings",
    [
        {"noise_multiplier": 1.0},
        {"noise_multiplier": 0.6, "cohort": 6},
        {"epsilon": 4.0},
        {"epsilon": 2.0, "cohort": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("rounds", [1, 6])
def test_each_row_of_figures_is_one_client(settings: dict[str, Any], rounds: int) -> None:
    plan = sample_plan(**settings)
    figures, steps = plan.figures(rounds), steps_of(rounds, cohort=settings.get("cohort", 3))
    noise = plan.noise_multipliers.tolist()
    rows = [
        (noise[client], steps.get(client, 0), min(1.0, 16 / size) if noise[client] else 0.0)
        for client, size in enumerate(SIZES)
    ]
    quantiles = figures["clients"].values()
    assert {tuple(row[key] for key in ("noise_multiplier", "steps", "sampling_probability")) for row in quantiles} <= {
        *rows
    }
    epsilons = [row["epsilon"] for row in quantiles]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == plan.epsilon(rounds)
    for row in quantiles:  # the epsilon of a row follows from the other numbers of the row
        places = (row["noise_multiplier"], row["steps"], row["sampling_probability"])
        own = [spent_by(client, *places[:2]) for client, found in enumerate(rows) if found == places]
        assert row["epsilon"] == pytest.approx(own[0] if row["steps"] else 0.0, rel=1e-3)


def test_truncated_batches_need_more_noise() -> None:
    free, cut = (sample_plan(epsilon=4.0, max_batch=most) for most in (None, 16))
    took_part = free.noise_multipliers > 0
    assert (cut.noise_multipliers > 0).tolist() == took_part.tolist()
    assert (cut.noise_multipliers >= free.noise_multipliers).all()
    large = took_part & (torch.tensor(SIZES) > 16)
    assert (cut.noise_multipliers > free.noise_multipliers)[large].all()


# --- the budget --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sample_plan, user_plan])
def test_a_run_ends_before_its_budget_is_exceeded(make: Any) -> None:
    free = make(noise_multiplier=1.0)
    budget = (free.epsilon(3) + free.epsilon(4)) / 2
    rounds = [number for number in range(1, 7) if free.epsilon(number) <= budget]
    assert make(noise_multiplier=1.0, stop_at_epsilon=budget).num_rounds == max(rounds) < 6
    assert make(noise_multiplier=1.0, stop_at_epsilon=free.epsilon(6)).num_rounds == 6
    with pytest.raises(ConfigError, match=r"privacy\.stop_at_epsilon: 0\.01 is less than .* of the first round"):
        make(noise_multiplier=1.0, stop_at_epsilon=0.01)


@pytest.mark.parametrize("make", [sample_plan, user_plan])
def test_refuses_more_rounds_than_the_noise_was_calibrated_for(make: Any) -> None:
    begun = make(epsilon=3.0, rounds=3)
    with pytest.raises(ConfigError) as caught:
        make(begun.noise_multipliers, epsilon=3.0, rounds=6)
    message = str(caught.value)
    assert "privacy.epsilon: 3 is less than" in message
    assert "federation.rounds: 6" in message
    asked = float(message.split("give privacy.epsilon: ")[1].split(",")[0])
    raised = make(begun.noise_multipliers, epsilon=asked, rounds=6)
    had = begun.noise_multipliers > 0
    assert raised.noise_multipliers[had].tolist() == begun.noise_multipliers[had].tolist()
    assert asked - 0.01 <= raised.epsilon(6) <= asked
    assert raised.epsilon(3) == begun.epsilon(3)
    same = make(begun.noise_multipliers, epsilon=3.0, rounds=3)
    assert same.noise_multipliers.tolist() == begun.noise_multipliers.tolist()


def test_a_client_that_joins_later_gets_noise_then() -> None:
    begun = sample_plan(epsilon=3.0, rounds=1)
    raised = sample_plan(begun.noise_multipliers, epsilon=20.0, rounds=6)
    steps = steps_of(6)
    new = [client for client in steps if not begun.noise_multipliers[client]]
    assert new
    for client in new:
        assert 0.98 * 20 < spent_by(client, float(raised.noise_multipliers[client]), steps[client]) <= 20


def test_refuses_noise_too_small_to_account_for() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.noise_multiplier: 1e-06 is too little .*give at least 0\.01"):
        sample_plan(noise_multiplier=1e-6)


@pytest.mark.parametrize("name", ["none", "paper_noise"])
def test_privacy_without_accounting_has_no_plan(name: str) -> None:
    assert plan_of(name=name) is None


def test_a_warning_names_clients_for_whom_delta_is_too_large() -> None:
    assert sample_plan(noise_multiplier=1.0, dp_delta=1e-3).warning is None
    participation = participation_of(name="sample", noise_multiplier=1.0, dp_delta=1 / 200)
    plan = make_privacy_plan(participation.whole_config, participation)
    large = [client for client in steps_of(6) if SIZES[client] >= 200]
    assert f"privacy.dp_delta: 0.005 is at least 1 / n for {len(large)} of 8 clients" in plan.warning
    for client in large:
        assert f"{client} ({SIZES[client]} samples)" in plan.warning
    many = sample_plan(noise_multiplier=1.0, dp_delta=0.2, cohort=8)
    assert "8 of 8 clients" in many.warning
    assert "and 3 more" in many.warning
    assert "\n" not in many.warning
    assert user_plan(noise_multiplier=1.0, dp_delta=1e-3).warning is None
    assert "1 / N for 8 clients" in user_plan(noise_multiplier=1.0, dp_delta=0.125).warning


# --- users -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accountant", "used"), [("auto", "pld"), ("rdp", "rdp")])
def test_a_round_is_one_release(accountant: str, used: str) -> None:
    plan = user_plan(noise_multiplier=1.2, accountant=accountant)
    for rounds in range(7):
        expected = accounting.epsilon(((accounting.gaussian_event(1.2, 3 / 8), rounds),), DELTA, used)
        assert plan.epsilon(rounds) == expected
    figures = json.loads(json.dumps(plan.figures(5)))
    assert (figures["steps"], figures["sampling_probability"], figures["accountant"]) == (5, 3 / 8, used)
    assert figures["noise_multiplier"] == 1.2
    assert "clients" not in figures


def test_user_level_noise_meets_the_target() -> None:
    plan = user_plan(epsilon=3.0)
    assert plan.noise_multipliers.shape == (1,)
    assert 0.98 * 3.0 < plan.epsilon(6) <= 3.0
    assert plan.delta_noise_multiplier == plan.noise_multipliers
    assert plan.count_noise is None


def available_in(number: int, **settings: Any) -> list[int]:
    participation = participation_of(name="user", noise_multiplier=1.0, **settings)
    here = participation.availability.of(np.arange(participation.population), number)
    assert participation.available(number) == here.sum()
    return np.flatnonzero(here).tolist()


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_fewer_available_clients_spend_more(share: float) -> None:
    participation = {"name": "poisson", "availability": {"name": "on_off", "share": share}}
    plan, events = user_plan(noise_multiplier=1.0, participation=participation), []
    for number in range(6):
        if available := len(available_in(number, participation=participation)):
            events.append((accounting.gaussian_event(1.0, min(1.0, 3 / available)), 1))
    assert len(set(events)) > 1
    assert plan.epsilon(6) == pytest.approx(accounting.epsilon(tuple(events), DELTA, "pld"), rel=1e-3)
    spent = [plan.epsilon(rounds) for rounds in range(7)]
    assert spent == sorted(spent)
    assert plan.epsilon(6) > user_plan(noise_multiplier=1.0).epsilon(6)


@pytest.mark.parametrize("sampling", ["poisson", "without_replacement"])
def test_clients_without_samples_do_not_lower_epsilon(sampling: str) -> None:
    """Three of four clients have no samples. The run spends as much as one with only the other clients."""
    settings = {"noise_multiplier": 1.0, "sampling": sampling, "accountant": "rdp"}
    settings["participation"] = {"name": "poisson" if sampling == "poisson" else "uniform"}
    sizes = [8 * (n % 4 == 0) for n in range(80)]
    among_others, alone = (user_plan(sizes=found, **settings) for found in (sizes, [8] * 20))
    assert among_others.figures(6) == alone.figures(6)
    assert among_others.epsilon(6) > user_plan(sizes=[8] * 80, **settings).epsilon(6)
    assert among_others.warning is None
    assert "1 / N for 20 clients" in user_plan(sizes=sizes, dp_delta=0.06, **settings).warning


@pytest.mark.parametrize(
    "partition", [{"name": "dirichlet", "alpha": 0.02}, {"name": "quantity", "alpha": 0.01}], ids=str
)
def test_a_plan_ahead_counts_the_clients_that_a_run_would_draw_from(partition: dict[str, Any]) -> None:
    tree = {
        "data": {"name": "digits", "clients": 64, "partition": {**partition, "min_samples": 0}},
        "federation": {"rounds": 2, "cohort": 4, "participation": {"name": "poisson"}},
        "privacy": {"name": "user", "noise_multiplier": 1.0},
    }
    plan = plan_privacy(parse_config(tree, "test"))
    assert plan.population < 64
    assert plan.figures(2)["sampling_probability"] == 4 / plan.population
    tree["federation"]["cohort"] = plan.population + 1
    with pytest.raises(ConfigError, match=f"larger than the {plan.population} clients that have samples, of 64"):
        plan_privacy(parse_config(tree, "test"))


def test_cohorts_of_a_fixed_size_are_accounted_without_replacement() -> None:
    uniform = {"name": "uniform"}
    plan = user_plan(noise_multiplier=4.0, sampling="without_replacement", participation=uniform)
    event = accounting.without_replacement_event(4.0, 8, 3)
    assert plan.epsilon(6) == accounting.epsilon(((event, 6),), DELTA, "rdp")
    assert plan.figures(6)["accountant"] == "rdp"
    fewer = uniform | {"availability": ON_OFF}
    plan = user_plan(noise_multiplier=4.0, sampling="without_replacement", participation=fewer)
    events = []
    for number in range(6):
        settings = {"sampling": "without_replacement", "participation": fewer}
        if available := len(available_in(number, **settings)):
            events.append((accounting.without_replacement_event(4.0, available, min(3, available)), 1))
    assert plan.epsilon(6) == pytest.approx(accounting.epsilon(tuple(events), DELTA, "rdp"), rel=1e-9)


def test_refuses_a_run_in_which_nobody_is_ever_available() -> None:
    nobody = {"name": "poisson", "availability": {"name": "on_off", "share": 1e-6}}
    with pytest.raises(ConfigError, match=r"federation\.participation\.availability: no client is available"):
        user_plan(epsilon=1.0, participation=nobody)


def test_adaptive_clipping_shares_the_budget() -> None:
    assert user_plan(noise_multiplier=0.2, adaptive={}).count_noise == 0.2, (
        "the default leaves most of the budget to the deltas"
    )
    plan = user_plan(noise_multiplier=0.1, adaptive={})
    assert plan.count_noise == 3 / 20
    assert plan.delta_noise_multiplier == accounting.delta_noise_multiplier(0.1, 3 / 20)
    assert plan.epsilon(6) == user_plan(noise_multiplier=0.1).epsilon(6)
    assert user_plan(noise_multiplier=1.0, adaptive={"count_noise": 0.9}).count_noise == 0.9
    with pytest.raises(ConfigError, match=r"privacy\.adaptive\.count_noise: 0\.15 spends all"):
        user_plan(noise_multiplier=0.3, adaptive={"count_noise": 0.15})


# --- how cohorts are drawn ---------------------------------------------------------------------------------------


def test_clients_are_drawn_with_the_probability_that_is_accounted_for() -> None:
    participation = {"name": "poisson", "availability": ON_OFF | {"rounds": 10**6}}
    settings = {"sizes": [16] * 20, "cohort": 4, "participation": participation}
    drawing = participation_of(name="user", noise_multiplier=1.0, **settings)
    available, rounds = available_in(0, **settings), 1500
    assert 4 < len(available) < 20
    counts, q = Counter(), 4 / len(available)
    for number in range(rounds):
        assert drawing.sampling_probability(number) == q
        counts.update(drawing.select(number).tolist())
    assert set(counts) == set(available)
    error = math.sqrt(rounds * q * (1 - q))
    assert all(abs(count - rounds * q) < 5 * error for count in counts.values())


@pytest.mark.parametrize("name", ["none", "sample"])
def test_runs_without_user_level_privacy_draw_as_before(name: str) -> None:
    privacy = {"none": {}, "sample": {"noise_multiplier": 1.0}}[name]
    settings = {"sizes": [16] * 40, "cohort": 8, "participation": {"name": "poisson", "availability": ON_OFF}}
    drawing = participation_of(name=name, **privacy, **settings)
    for number in range(20):
        draw = Draw(1, number, lambda ids, number=number: ids[drawing.availability.of(ids, number)])
        assert drawing.select(number).tolist() == poisson_draw(40, 8 / 40, draw).tolist()
