"""The cost of noisy releases in (epsilon, delta)-differential privacy, and the noise that a budget needs.

dp-accounting does the accounting: by privacy loss distributions (pld: Koskela et al. 2020, arXiv 1906.03049; Doroshenko
et al. 2022, arXiv 2207.04380) or by Renyi divergences (rdp: Mironov 2017, arXiv 1702.07476). Both give upper bounds.

Neighbouring data sets differ in the contribution of one sample or client. One of the two has a zero in its place, which
costs as much as adding or removing the contribution. For cohorts of a fixed size, one client replaces another.
dp_delta is the delta of (epsilon, delta). A noise multiplier is the standard deviation of the noise in units of the
clipping norm.
"""

import logging
import math
from collections.abc import Callable
from decimal import ROUND_CEILING, Context
from functools import lru_cache
from typing import Literal, TypeAlias

import dp_accounting as dp
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq

from fedpeft_dist.config.errors import ConfigError

Releases: TypeAlias = tuple[tuple[dp.DpEvent, int], ...]
"""Events, and how often each is released. An event that will be released later has a count of 0: it costs nothing, but
pld's grid is fine enough for it. So epsilon never falls during a run."""
AccountantName: TypeAlias = Literal["pld", "rdp"]

_GRID = 0.1
"""Spacing of pld's grid, in standard deviations of one release's privacy loss."""
SMALLEST_NOISE, _LARGEST_NOISE = 0.01, 1e6
_DIGITS = Context(prec=4, rounding=ROUND_CEILING)
_LOG_TOLERANCE = 1e-4


def gaussian_event(
    noise_multiplier: float, sampling_probability: float, max_batch: int | None = None, dataset_size: int | None = None
) -> dp.DpEvent:
    """A sum of clipped contributions with Gaussian noise. Each contribution is sampled independently.

    Args:
        max_batch: largest number of contributions in the sum. If more are sampled, a random subset of this size is
            summed (Ganesh et al. 2025, arXiv 2508.15089).
        dataset_size: number of contributions to sample from; needed with max_batch.
    """
    if max_batch is not None:
        return dp.TruncatedSubsampledGaussianDpEvent(dataset_size, sampling_probability, max_batch, noise_multiplier)
    event = dp.GaussianDpEvent(noise_multiplier)
    return event if sampling_probability == 1.0 else dp.PoissonSampledDpEvent(sampling_probability, event)


def without_replacement_event(noise_multiplier: float, population: int, cohort: int) -> dp.DpEvent:
    """A sum over a cohort of fixed size. Replacing a client moves the sum by at most twice the clipping norm."""
    return dp.SampledWithoutReplacementDpEvent(population, cohort, dp.GaussianDpEvent(noise_multiplier / 2))


@lru_cache(maxsize=2**14)
def epsilon(releases: Releases, dp_delta: float, accountant: AccountantName) -> float:
    """An upper bound of the epsilon of all releases together.

    For speed, pld's grid is coarser than dp-accounting's default, and finer if losses are small. Its error only makes
    epsilon larger. Compared with a grid four times as fine, an epsilon below 10 is larger by less than 0.2 %, for
    sampling probabilities from 0.001 to 1, noise multipliers from 0.3 to 5, and up to 3,000 releases.

    Raises:
        ConfigError: dp_delta is too small for any epsilon.
    """
    if not any(count for _, count in releases):
        return 0.0
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # rdp warns about orders that it skips; the remaining orders still bound epsilon
    try:
        book = _open([event for event, _ in releases], accountant)
        for event, count in releases:
            if count:
                book.compose(event, count)
        spent = float(book.get_epsilon(dp_delta))
    finally:
        logger.setLevel(level)
    if not math.isfinite(spent):
        raise ConfigError(f"privacy.dp_delta: {dp_delta:g} is too small for the accountant {accountant}; give more")
    return spent


def calibrate(
    releases_of: Callable[[float], Releases], target: float, dp_delta: float, accountant: AccountantName
) -> float:
    """The smallest noise multiplier whose epsilon is at most the target: at least SMALLEST_NOISE, with four digits.

    Args:
        releases_of: the releases for a noise multiplier.

    Raises:
        ConfigError: no noise multiplier meets the target.
    """

    def excess(log_noise: float) -> float:
        return epsilon(releases_of(math.exp(log_noise)), dp_delta, accountant) - target

    low = high = 0.0
    while excess(high) > 0:
        low, high = high, high + math.log(2)
        if high > math.log(_LARGEST_NOISE):
            raise ConfigError(
                f"privacy.epsilon: {target:g} is out of reach at privacy.dp_delta: {dp_delta:g} by the accountant "
                f"{accountant}, whatever the noise; give more"
            )
    while excess(low) <= 0:
        if low < math.log(SMALLEST_NOISE):
            return SMALLEST_NOISE
        low, high = low - math.log(2), low
    noise = _DIGITS.create_decimal_from_float(math.exp(brentq(excess, low, high, xtol=_LOG_TOLERANCE)))
    while epsilon(releases_of(float(noise)), dp_delta, accountant) > target:
        noise = _DIGITS.next_plus(noise)
    return float(noise)


def delta_noise_multiplier(noise_multiplier: float, count_noise: float) -> float:
    """The noise multiplier for the deltas if the number of unclipped deltas takes a part of the budget.

    Both releases together cost what `noise_multiplier` alone would (Andrew et al. 2021, arXiv 1905.03871, theorem 1).

    Args:
        count_noise: standard deviation of the noise on the number of unclipped deltas.

    Raises:
        ConfigError: the number alone spends the whole budget.
    """
    if noise_multiplier >= 2 * count_noise:
        raise ConfigError(
            f"privacy.adaptive.count_noise: {count_noise:g} spends all that the noise multiplier {noise_multiplier:g} "
            f"leaves; give more than {noise_multiplier / 2:g}"
        )
    return (noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5


def _open(events: list[dp.DpEvent], accountant: AccountantName) -> dp.PrivacyAccountant:
    if accountant == "pld":
        return PLDAccountant(dp.NeighboringRelation.REPLACE_SPECIAL, min(map(_interval, events)))
    replaces = any(isinstance(event, dp.SampledWithoutReplacementDpEvent) for event in events)
    return RdpAccountant(None, dp.NeighboringRelation["REPLACE_ONE" if replaces else "REPLACE_SPECIAL"])


def _interval(event: dp.DpEvent) -> float:
    """The grid's spacing for an event. The grid's error should be a small part of the variance of the privacy loss."""
    probability = getattr(event, "sampling_probability", 1.0)
    noise = (event.event if isinstance(event, dp.PoissonSampledDpEvent) else event).noise_multiplier
    # Two estimates of the deviation of a sampled Gaussian's loss: few samples with much noise; and the other cases.
    deviation = probability * math.sqrt(math.expm1(min(noise**-2, 700.0)))
    return _GRID * min(deviation, math.sqrt(probability) / noise)
