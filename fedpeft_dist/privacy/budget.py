"""A run's privacy plan: the noise, what the run has spent after each round, and how long its budget lasts.

Everything is known before training. Who takes part in which round, with how many local steps, follows from the config,
the seed and the round, and so does what is released. Clients' sizes, the schedule and the partition are public.
So it is also public which clients have samples. Only these clients are drawn.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import AccountedPrivacy, RunConfig
from fedpeft_dist.privacy import accounting
from fedpeft_dist.privacy.accounting import Releases


class PrivacyPlan(ABC):
    """The common part of the plans of all mechanisms with a guarantee."""

    num_rounds: int
    """`federation.rounds`, or fewer if `privacy.stop_at_epsilon` does not last for so many."""
    noise_multipliers: torch.Tensor
    """Noise multipliers, float64 on the CPU: [N] of the clients (0 for one that never takes part), or [1] of the
    server."""

    def __init__(self, config: RunConfig, privacy: AccountedPrivacy, accountant: accounting.AccountantName):
        self.privacy, self.accountant, self.rounds = privacy, accountant, config.federation.rounds
        if privacy.noise_multiplier is not None and privacy.noise_multiplier < accounting.SMALLEST_NOISE:
            raise ConfigError(
                f"privacy.noise_multiplier: {privacy.noise_multiplier:g} is too little to account for; give at least "
                f"{accounting.SMALLEST_NOISE:g}"
            )

    @abstractmethod
    def epsilon(self, rounds: int) -> float:
        """Epsilon after so many rounds. If each client spends by itself, the largest epsilon of a client."""

    @abstractmethod
    def figures(self, rounds: int) -> dict[str, Any]:
        """The plan's numbers after so many rounds, for JSON.

        The keys are name, epsilon, dp_delta, noise_multiplier, steps, sampling_probability, accountant and clip_norm.
        If clients differ, the numbers are those of the client with the largest epsilon. Then `clients` holds the
        numbers of one client for each quantile of epsilon over all clients; epsilon is 0 for a client that never takes
        part. `ranges` holds the smallest and the largest of each number over the clients that take part.
        """

    @property
    @abstractmethod
    def warning(self) -> str | None:
        """A line for the user if dp_delta is so large that the guarantee means little."""

    def _figures(self, rounds: int, **figures: Any) -> dict[str, Any]:
        privacy = self.privacy
        shared = {"dp_delta": privacy.dp_delta, "accountant": self.accountant, "clip_norm": privacy.clip_norm}
        return {"name": privacy.name, "epsilon": self.epsilon(rounds), **shared, **figures}

    def _spent(self, releases: Releases) -> float:
        return accounting.epsilon(releases, self.privacy.dp_delta, self.accountant)

    def _noise_for(self, releases_of: Callable[[float], Releases]) -> float:
        """The config's noise multiplier, or the smallest one that meets the config's epsilon with these releases."""
        privacy = self.privacy
        if privacy.epsilon is None:
            return privacy.noise_multiplier
        return accounting.calibrate(releases_of, privacy.epsilon, privacy.dp_delta, self.accountant)

    def _affordable_rounds(self) -> int:
        """`num_rounds`, once the noise is known."""
        privacy, rounds = self.privacy, self.rounds
        spent = self.epsilon(rounds)  # needed without a target, too: it refuses what cannot be accounted for
        if privacy.epsilon is not None and spent > privacy.epsilon:
            raise ConfigError(
                f"privacy.epsilon: {privacy.epsilon:g} is less than the {spent:.4g} that federation.rounds: {rounds} "
                f"would end at, with the noise that the run has begun with; give privacy.epsilon: "
                f"{math.ceil(100 * spent) / 100:g}, or fewer rounds"
            )
        if privacy.stop_at_epsilon is None:
            return rounds
        affordable = bisect_right(range(1, rounds + 1), privacy.stop_at_epsilon, key=self.epsilon)
        if not affordable:
            raise ConfigError(
                f"privacy.stop_at_epsilon: {privacy.stop_at_epsilon:g} is less than the {self.epsilon(1):.4g} of the "
                "first round; give more, or a larger privacy.noise_multiplier"
            )
        return affordable
