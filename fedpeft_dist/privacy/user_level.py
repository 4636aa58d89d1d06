"""User-level privacy (McMahan et al. 2018, arXiv 1710.06963, algorithm 1): clip, add, add noise.

A client's whole delta is clipped to C, all clients count alike, and the noisy sum is divided by the expected number of
clients, which is known beforehand. So an empty cohort is a step like any other, and a rejected delta counts as zero.

Shapes: V numbers that a client sends.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedpeft_dist.config.schema import CLIP_NORM_LIMIT, UserPrivacy
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.privacy.mechanisms import clip_factors, grid_bits, noise_on_grid, row_norms, truncate

_COUNT_BITS = 20
_LARGEST_STEP = 5.0
"""Largest change of log C in a round. A count that is mostly noise must not carry C out of all bounds."""


@dataclass(frozen=True)
class NoisyMean:
    """Clips what clients send to norm C, and adds noise to the sum.

    Implements aggregation's `MeanRule`; the integer beside a vector is half a count above or below zero.
    """

    privacy: UserPrivacy
    clip_norm: float
    """C of this round."""
    largest_cohort: int
    """The most clients that a round can have."""
    expected_cohort: int
    """The sum is divided by it."""
    noise_multiplier: float
    """Standard deviation of the noise on the sum, in units of C."""
    count_noise: float | None
    """Standard deviation of the noise on the number of unclipped deltas; None if C never changes."""
    noise_seed: int
    """The noise follows from it; no other release may have used it."""
    counts_alike: ClassVar[bool] = True

    @property
    def bits(self) -> int:
        """s: the grid has room for all clients of a round and for the noise."""
        return grid_bits(self.clip_norm * self.largest_cohort, self.clip_norm * self.noise_multiplier)

    def to_integers(self, sent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        norm = row_norms(sent.unsqueeze(0))
        # Centring "was it clipped?" at zero halves its sensitivity to a client that is replaced.
        sign = torch.where(norm[0] <= self.clip_norm, 1, -1)
        clipped = truncate(sent.unsqueeze(0), clip_factors(norm, self.clip_norm), self.bits)[0]
        return clipped, sign * 2**_COUNT_BITS

    def add_noise(self, total: torch.Tensor, extra: torch.Tensor, round_number: int) -> None:
        self._add(total, "user noise", round_number, self.noise_multiplier * self.clip_norm, self.bits)
        if self.count_noise is not None:
            self._add(extra, "count noise", round_number, 2 * self.count_noise, _COUNT_BITS)

    def mean(self, total: torch.Tensor, weight: int) -> torch.Tensor:
        return (total.double() / (self.expected_cohort * 2.0**self.bits)).float()

    def next_clip_norm(self, extra: int) -> float:
        """C moved towards the quantile of the deltas' norms (Andrew et al. 2021, arXiv 1905.03871, algorithm 1)."""
        if (adaptive := self.privacy.adaptive) is None:
            return self.clip_norm
        share = float(extra) * 2.0**-_COUNT_BITS / 2 / self.expected_cohort + 0.5
        exponent = -adaptive.lr * (share - adaptive.quantile)
        clip_norm = self.clip_norm * math.exp(min(max(exponent, -_LARGEST_STEP), _LARGEST_STEP))
        return min(max(clip_norm, 1 / CLIP_NORM_LIMIT), CLIP_NORM_LIMIT)

    def _add(self, values: torch.Tensor, purpose: str, round_number: int, deviation: float, bits: int) -> None:
        device = values.device
        key = torch.tensor([derive_seed(self.noise_seed, purpose, round_number)], device=device)
        deviations = torch.tensor([deviation], dtype=torch.float64, device=device)
        values += noise_on_grid(key, len(values), deviations, bits, self.privacy.secure_noise)[0]
