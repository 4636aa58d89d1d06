"""Epsilon for noise and noise for epsilon, against dp-accounting by hand, Opacus and closed forms."""

from __future__ import annotations

import logging
import math
from itertools import pairwise

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.privacy.accounting import (
    SMALLEST_NOISE,
    Releases,
    calibrate,
    delta_noise_multiplier,
    epsilon,
    gaussian_event,
    without_replacement_event,
)

ADD_REMOVE = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
GRID_ERROR = 0.002
"""Largest relative error that pld's grid may add to epsilon."""

SETTINGS = [
    # noise multiplier, sampling probability, releases, dp_delta
    (1.4, 64 / 781, 780, 1e-3),  # a client of the paper's setting: 6 rounds of 10 epochs
    (1.4, 64 / 781, 130, 1e-3),  # one round of this client
    (1.05, 16 / 64, 20, 1e-3),
    (1.0, 8 / 64, 50, 1e-3),  # cohorts of the paper's size, the noise of clip_norm
    (2.65, 16 / 19, 160, 1e-3),
    (0.81, 16 / 155, 36, 1e-3),
    (0.7, 0.02, 1000, 1e-5),
    (1.5, 0.5, 30, 1e-4),
    (5.0, 0.1, 3000, 1e-5),
    (4.0, 1.0, 10, 1e-3),
]


def sampled(noise: float, probability: float, count: int) -> Releases:
    return ((gaussian_event(noise, probability), count),)


def by_hand(noise: float, probability: float, count: int, dp_delta: float, accountant: str) -> float:
    event = dp_accounting.PoissonSampledDpEvent(probability, dp_accounting.GaussianDpEvent(noise))
    book = PLDAccountant(ADD_REMOVE) if accountant == "pld" else RdpAccountant(neighboring_relation=ADD_REMOVE)
    return book.compose(event, count).get_epsilon(dp_delta)


# --- epsilon -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "probability", "count", "dp_delta"), SETTINGS)
def test_rdp_equals_dp_accounting_by_hand(noise: float, probability: float, count: int, dp_delta: float) -> None:
    expected = by_hand(noise, probability, count, dp_delta, "rdp")
    assert epsilon(sampled(noise, probability, count), dp_delta, "rdp") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("noise", "probability", "count", "dp_delta"), SETTINGS[2:6])
def test_pld_is_close_to_dp_accounting_on_its_finer_grid(
    noise: float, probability: float, count: int, dp_delta: float
) -> None:
    expected = by_hand(noise, probability, count, dp_delta, "pld")
    found = epsilon(sampled(noise, probability, count), dp_delta, "pld")
    assert expected * (1 - 1e-9) <= found <= expected * (1 + GRID_ERROR)


@pytest.mark.parametrize(("noise", "probability", "count", "dp_delta"), SETTINGS)
def test_opacus_agrees(noise: float, probability: float, count: int, dp_delta: float) -> None:
    error, prv, rdp = 0.01, PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = [(noise, probability, count)]
    releases = sampled(noise, probability, count)
    upper = prv.get_epsilon(dp_delta, eps_error=error)
    # Opacus' upper and lower bounds differ by a little more than twice the error.
    assert upper - 2.2 * error <= epsilon(releases, dp_delta, "pld") <= upper * (1 + GRID_ERROR)
    # dp-accounting skips fractional orders that converge slowly, and never skips a whole order.
    whole = [order for order in DEFAULT_RDP_ORDERS if order == int(order)]
    least, most = (rdp.get_epsilon(dp_delta, alphas=orders) for orders in (DEFAULT_RDP_ORDERS, whole))
    assert least * (1 - 1e-6) <= epsilon(releases, dp_delta, "rdp") <= most * (1 + 1e-6)


@pytest.mark.parametrize(
    ("noise", "count", "dp_delta"), [(4.0, 10, 1e-3), (1.0, 1, 1e-5), (0.3, 7, 1e-6), (90.0, 9, 1e-2)]
)
def test_without_sampling_epsilon_is_that_of_the_gaussian_mechanism(noise: float, count: int, dp_delta: float) -> None:
    """Balle and Wang 2018, arXiv 1805.06530, theorem 8."""
    mu = math.sqrt(count) / noise

    def excess(spent: float) -> float:
        return norm.cdf(mu / 2 - spent / mu) - math.exp(spent) * norm.cdf(-mu / 2 - spent / mu) - dp_delta

    exact = brentq(excess, 0.0, 300.0, xtol=1e-12) if excess(0.0) > 0 else 0.0
    found = epsilon(sampled(noise, 1.0, count), dp_delta, "pld")
    assert exact * (1 - 1e-9) <= found <= exact * (1 + GRID_ERROR)


def test_the_small_cohorts_of_the_paper() -> None:
    """8 of 64 clients, 50 rounds, noise of one clipping norm. Epsilon depends on how cohorts are drawn."""
    assert epsilon(sampled(1.0, 8 / 64, 50), 1e-3, "pld") == pytest.approx(4.2, abs=0.05)
    assert epsilon(sampled(1.0, 8 / 64, 50), 1e-3, "rdp") == pytest.approx(5.1, abs=0.05)
    fixed = ((without_replacement_event(1.0, 64, 8), 50),)
    assert epsilon(fixed, 1e-3, "rdp") == pytest.approx(55.3, abs=0.05)
    naive = ((without_replacement_event(2.0, 64, 8), 50),)  # as if replacing a client moved the sum by one norm
    assert epsilon(naive, 1e-3, "rdp") == pytest.approx(9.6, abs=0.05)


def test_whole_cohorts_without_replacement_have_twice_the_sensitivity() -> None:
    whole = ((without_replacement_event(3.0, 8, 8), 20),)
    assert epsilon(whole, 1e-3, "rdp") == pytest.approx(epsilon(sampled(1.5, 1.0, 20), 1e-3, "rdp"), rel=1e-12)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_nothing_released_costs_nothing_and_more_costs_more(accountant: str) -> None:
    assert epsilon((), 1e-3, accountant) == 0.0
    assert epsilon(sampled(1.0, 0.1, 0), 1e-3, accountant) == 0.0
    spent = [epsilon(sampled(1.0, 0.1, count), 1e-3, accountant) for count in range(0, 60, 3)]
    assert all(low < high for low, high in pairwise(spent[1:]))
    noisy = [epsilon(sampled(noise, 0.1, 50), 1e-3, accountant) for noise in (0.5, 1.0, 2.0, 4.0)]
    assert noisy == sorted(noisy, reverse=True)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_different_releases_add_up(accountant: str) -> None:
    releases = ((gaussian_event(1.0, 0.1), 20), (gaussian_event(1.5, 0.3), 10), (gaussian_event(3.0, 1.0), 5))
    book = PLDAccountant(ADD_REMOVE) if accountant == "pld" else RdpAccountant(neighboring_relation=ADD_REMOVE)
    for event, count in releases:
        book.compose(event, count)
    expected = book.get_epsilon(1e-4)
    assert expected * (1 - 1e-9) <= epsilon(releases, 1e-4, accountant) <= expected * (1 + GRID_ERROR)


def test_later_releases_count_for_the_grid() -> None:
    """Otherwise epsilon could fall when a release needs a finer grid."""
    first, second = gaussian_event(0.8, 0.5), gaussian_event(0.8, 0.001)
    spent = [epsilon(((first, 20), (second, count)), 1e-3, "pld") for count in (0, 1, 2)]
    assert spent == sorted(spent)


def test_a_truncated_batch_costs_more() -> None:
    noise, size, batch, count = 1.2, 100, 16, 40
    hand = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    event = dp_accounting.TruncatedSubsampledGaussianDpEvent(size, batch / size, batch, noise)
    expected = hand.compose(event, count).get_epsilon(1e-3)
    spent = [
        epsilon(((gaussian_event(noise, batch / size, most, size), count),), 1e-3, "pld")
        for most in (batch, 20, 30, 60)
    ]
    assert expected * (1 - 1e-9) <= spent[0] <= expected * (1 + GRID_ERROR)
    assert spent == sorted(spent, reverse=True)
    untruncated = epsilon(sampled(noise, batch / size, count), 1e-3, "pld")
    assert spent[0] > 1.2 * untruncated
    assert spent[-1] == pytest.approx(untruncated, rel=1e-6)


def test_rdp_skips_orders_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("absl").addHandler(caplog.handler)
    try:
        by_hand(1.5, 0.5, 30, 1e-4, "rdp")
        assert "failed to converge" in caplog.text
        caplog.clear()
        epsilon.cache_clear()
        epsilon(sampled(1.5, 0.5, 30), 1e-4, "rdp")
        assert caplog.text == ""
    finally:
        logging.getLogger("absl").removeHandler(caplog.handler)


def test_refuses_a_delta_below_the_accuracy_of_pld() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.dp_delta: 1e-18 is too small for the accountant pld"):
        epsilon(sampled(1.0, 0.1, 10), 1e-18, "pld")
    assert math.isfinite(epsilon(sampled(1.0, 0.1, 10), 1e-18, "rdp"))


# --- calibration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("target", [0.1, 2.0, 5.0, 50.0])
@pytest.mark.parametrize(("probability", "count"), [(64 / 781, 780), (1.0, 20), (0.01, 1)])
def test_calibrate_finds_the_least_noise_for_a_target(
    accountant: str, target: float, probability: float, count: int
) -> None:
    noise = calibrate(lambda noise: sampled(noise, probability, count), target, 1e-3, accountant)
    assert epsilon(sampled(noise, probability, count), 1e-3, accountant) <= target
    assert epsilon(sampled(noise * 0.998, probability, count), 1e-3, accountant) > target
    assert float(f"{noise:.4g}") == noise, "the printed noise is the noise in use"


def test_calibrate_returns_the_smallest_noise_for_an_easy_target() -> None:
    assert calibrate(lambda noise: sampled(noise, 0.1, 10), 1e7, 1e-3, "pld") == SMALLEST_NOISE


def test_calibrate_refuses_a_target_out_of_reach() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.epsilon: 0\.0001 is out of reach at .*dp_delta: 1e-10.*give more"):
        calibrate(lambda noise: sampled(noise, 1.0, 10**6), 1e-4, 1e-10, "rdp")


# --- adaptive clipping -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "count_noise"), [(1.0, 0.51), (0.3, 4.0), (2.0, 1.01)])
def test_deltas_and_count_together_cost_what_the_noise_multiplier_says(noise: float, count_noise: float) -> None:
    """The count's sensitivity is a half: two Gaussians in one release add up by their inverse squares."""
    of_deltas = delta_noise_multiplier(noise, count_noise)
    assert of_deltas > noise
    together = ((gaussian_event(of_deltas, 1.0), 10), (gaussian_event(2 * count_noise, 1.0), 10))
    assert epsilon(together, 1e-3, "rdp") == pytest.approx(epsilon(sampled(noise, 1.0, 10), 1e-3, "rdp"), rel=1e-9)


@pytest.mark.parametrize("noise", [0.8, 1.0])
def test_refuses_a_count_that_spends_everything(noise: float) -> None:
    with pytest.raises(ConfigError, match=f"privacy.adaptive.count_noise: 0.4 .*give more than {noise / 2:g}"):
        delta_noise_multiplier(noise, 0.4)
