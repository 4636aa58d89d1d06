"""Aggregation under user-level privacy (McMahan et al. 2018, arXiv 1710.06963, algorithm 1): clip, add, add noise.

A client's whole delta is clipped to C, all clients count alike, and the noisy sum is divided by the number of clients
to expect, which is known beforehand. So a cohort that happens to be empty is a step like any other, and a rejected
delta counts as zero.

Shapes: P trainable parameters.
"""

from __future__ import annotations

import math

import torch

from fedpeft_dist.config.schema import CLIP_NORM_LIMIT, UserPrivacy
from fedpeft_dist.federation.aggregation import TAIL, UNCLIPPED, Aggregator
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.privacy.mechanisms import clip_factors, grid_bits, noise_on_grid, row_norms, truncate
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.training.local_training import ClientUpdate

_COUNT_BITS = 20
_LARGEST_STEP = 5.0
"""Of the logarithm of C, in a round; a count that is mostly noise must not carry C out of all bounds."""


class UserAggregator(Aggregator):
    """
    Args:
        largest_cohort: the most clients that a round can have.
        expected_cohort: what the sum is divided by.
        noise_multiplier: of the noise on the deltas, in units of C.
        count_noise: standard deviation of the noise on the number of unclipped deltas; None where C stays.
        noise_seed: what the noise follows from; no other release may have used it.
    """

    def __init__(
        self,
        num_parameters: int,
        largest_cohort: int,
        expected_cohort: int,
        privacy: UserPrivacy,
        noise_multiplier: float,
        count_noise: float | None,
        runtime: Runtime,
        noise_seed: int,
    ):
        super().__init__(num_parameters, largest_cohort, runtime)
        self.largest_cohort, self.expected_cohort = largest_cohort, expected_cohort
        self.privacy, self.noise_multiplier, self.count_noise = privacy, noise_multiplier, count_noise
        self.noise_seed = noise_seed
        self.state["clip_norm"] = torch.tensor(privacy.clip_norm, dtype=torch.float64)

    @property
    def clip_norm(self) -> float:
        """C of the next round."""
        return float(self.state["clip_norm"])

    def figures(self) -> dict[str, float]:
        return {} if self.privacy.adaptive is None else {"clip_norm": self.clip_norm}

    @property
    def bits(self) -> int:
        """s: the grid has room for all clients of a round and for the noise."""
        return grid_bits(self.clip_norm * self.largest_cohort, self.clip_norm * self.noise_multiplier)

    def _weight(self, update: ClientUpdate) -> int:
        return 1

    def _quantized(self, update: ClientUpdate, accepted: torch.Tensor) -> torch.Tensor:
        delta = update.delta.unsqueeze(0)
        norm = row_norms(delta)
        # Half a count above or below zero: replacing "was it clipped?" by its centre halves its sensitivity.
        sign = torch.where(norm[0] <= self.clip_norm, 1, -1) * accepted.long()
        self.total[-TAIL + UNCLIPPED] += sign * 2**_COUNT_BITS
        return truncate(delta, clip_factors(norm, self.clip_norm), self.bits)[0]

    def _add_noise(self, round_number: int) -> None:
        self._add(self.total[:-TAIL], "user noise", round_number, self.noise_multiplier * self.clip_norm, self.bits)
        if self.count_noise is not None:
            unclipped = self.total[-TAIL + UNCLIPPED].view(1)
            self._add(unclipped, "count noise", round_number, 2 * self.count_noise, _COUNT_BITS)

    def _add(self, values: torch.Tensor, purpose: str, round_number: int, deviation: float, bits: int) -> None:
        device = values.device
        key = torch.tensor([derive_seed(self.noise_seed, purpose, round_number)], device=device)
        deviations = torch.tensor([deviation], dtype=torch.float64, device=device)
        values += noise_on_grid(key, len(values), deviations, bits, self.privacy.secure_noise)[0]

    def _mean(self, total: torch.Tensor, weight: int) -> torch.Tensor:
        return (total.double() / (self.expected_cohort * 2.0**self.bits)).float()

    def _end_round(self, tail: torch.Tensor) -> None:
        """Moves C towards the quantile of the deltas' norms (Andrew et al. 2021, arXiv 1905.03871, algorithm 1)."""
        adaptive = self.privacy.adaptive
        if adaptive is None:
            return
        centred = float(tail[UNCLIPPED]) * 2.0**-_COUNT_BITS / 2
        share = centred / self.expected_cohort + 0.5
        exponent = -adaptive.lr * (share - adaptive.quantile)
        clip_norm = self.clip_norm * math.exp(min(max(exponent, -_LARGEST_STEP), _LARGEST_STEP))
        clip_norm = min(max(clip_norm, 1 / CLIP_NORM_LIMIT), CLIP_NORM_LIMIT)
        self.state = self.state | {"clip_norm": torch.tensor(clip_norm, dtype=torch.float64)}
