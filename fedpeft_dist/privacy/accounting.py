"""What noisy releases cost in (epsilon, delta)-differential privacy, and the noise that a budget asks for.

dp-accounting does the accounting: by privacy loss distributions (pld: Koskela et al. 2020, arXiv 1906.03049; Doroshenko
et al. 2022, arXiv 2207.04380) or by Renyi divergences (rdp: Mironov 2017, arXiv 1702.07476). Either is an upper bound.

Neighbours differ in one sample or client: its contribution is zero in one of the two, which costs what adding or
removing it does, or, for cohorts of a fixed size, another one's. dp_delta is the delta of (epsilon, delta), and a
noise multiplier is the standard deviation of the noise in units of the clipping norm.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import ROUND_CEILING, Context
from functools import lru_cache
from typing import Literal, TypeAlias

from dp_accounting import (
    DpEvent,
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    PrivacyAccountant,
    SampledWithoutReplacementDpEvent,
    TruncatedSubsampledGaussianDpEvent,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq

from fedpeft_dist.config.errors import ConfigError

Releases: TypeAlias = tuple[tuple[DpEvent, int], ...]
"""What is released, each with how often. One that is not released yet, 0 times, costs nothing, but the grid of pld
takes account of it: so epsilon never falls as a run goes on."""
AccountantName: TypeAlias = Literal["pld", "rdp"]

_GRID = 0.1
"""The grid of pld, in standard deviations of one release's privacy loss."""
SMALLEST_NOISE, _LARGEST_NOISE = 0.01, 1e6
_DIGITS = Context(prec=4, rounding=ROUND_CEILING)
_LOG_TOLERANCE = 1e-4


def gaussian_event(
    noise_multiplier: float,
    sampling_probability: float,
    max_batch: int | None = None,
    dataset_size: int | None = None,
) -> DpEvent:
    """A sum of clipped contributions with Gaussian noise, each of which is sampled by itself.

    Args:
        max_batch: where more were sampled, a random subset of so many is summed (Ganesh et al. 2025, arXiv 2508.15089).
        dataset_size: how many there are to sample from; goes with max_batch.
    """
    if max_batch is not None:
        return TruncatedSubsampledGaussianDpEvent(dataset_size, sampling_probability, max_batch, noise_multiplier)
    event = GaussianDpEvent(noise_multiplier)
    return event if sampling_probability == 1.0 else PoissonSampledDpEvent(sampling_probability, event)


def without_replacement_event(noise_multiplier: float, population: int, cohort: int) -> DpEvent:
    """A sum over a cohort of fixed size. To replace a client moves the sum by up to twice the clipping norm."""
    return SampledWithoutReplacementDpEvent(population, cohort, GaussianDpEvent(noise_multiplier / 2))


@lru_cache(maxsize=2**14)
def epsilon(releases: Releases, dp_delta: float, accountant: AccountantName) -> float:
    """An upper bound, for all of the releases together.

    The grid of pld is coarser than dp-accounting's default, for speed, and finer where losses are small; its error is
    on the safe side. Against a grid four times as fine, epsilon is larger by less than 0.2 % where it is below 10, for
    sampling probabilities from 0.001 to 1, noise multipliers from 0.3 to 5, and up to 3,000 releases.

    Raises:
        ConfigError: dp_delta is too small for any epsilon.
    """
    if not any(count for _, count in releases):
        return 0.0
    with _quiet():
        book = _open(releases, accountant)
        for event, count in releases:
            if count:
                book.compose(event, count)
        spent = float(book.get_epsilon(dp_delta))
    if not math.isfinite(spent):
        raise ConfigError(f"privacy.dp_delta: {dp_delta:g} is too small for the accountant {accountant}; give more")
    return spent


def calibrate(
    releases_of: Callable[[float], Releases], target: float, dp_delta: float, accountant: AccountantName
) -> float:
    """The smallest noise multiplier, with four digits and from SMALLEST_NOISE on, whose epsilon is at most the target.

    Args:
        releases_of: what is released with a given noise multiplier.

    Raises:
        ConfigError: no noise is enough.
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
    """That of the noise on the deltas, where part of the budget goes to the number of unclipped ones.

    Together both cost what `noise_multiplier` alone would (Andrew et al. 2021, arXiv 1905.03871, theorem 1).

    Args:
        count_noise: standard deviation of the noise on that number.

    Raises:
        ConfigError: the number alone costs as much.
    """
    if noise_multiplier >= 2 * count_noise:
        raise ConfigError(
            f"privacy.adaptive.count_noise: {count_noise:g} spends all that the noise multiplier {noise_multiplier:g} "
            f"leaves; give more than {noise_multiplier / 2:g}"
        )
    return (noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5


def _open(releases: Releases, accountant: AccountantName) -> PrivacyAccountant:
    events = [event for event, _ in releases]
    if accountant == "pld":
        return PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, min(map(_interval, events)))
    replaces = any(isinstance(event, SampledWithoutReplacementDpEvent) for event in events)
    relation = NeighboringRelation.REPLACE_ONE if replaces else NeighboringRelation.REPLACE_SPECIAL
    return RdpAccountant(neighboring_relation=relation)


def _interval(event: DpEvent) -> float:
    """Of the grid: the error that it adds to the variance of a privacy loss should be a small part of it."""
    probability = getattr(event, "sampling_probability", 1.0)
    noise = (event.event if isinstance(event, PoissonSampledDpEvent) else event).noise_multiplier
    # The loss of a sampled Gaussian: of few samples with much noise, and of many or with little.
    deviation = probability * math.sqrt(math.expm1(min(noise**-2, 700.0)))
    return _GRID * min(deviation, math.sqrt(probability) / noise)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without rdp's warnings of orders that it leaves out, for the others still bound epsilon."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
