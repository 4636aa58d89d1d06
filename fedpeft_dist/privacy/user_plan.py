"""The plan of user-level privacy: the server adds noise, and each round releases one noisy sum."""

from collections import Counter
from typing import Any

import torch

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.participation.plan import Participation
from fedpeft_dist.privacy import accounting
from fedpeft_dist.privacy.accounting import Releases
from fedpeft_dist.privacy.budget import PrivacyPlan


class UserPlan(PrivacyPlan):
    """
    Args:
        noise_multipliers: float64 [1], that of the run so far, or None.
    """

    count_noise: float | None = None
    """Standard deviation of the noise on the number of unclipped deltas; None if the clipping norm is fixed."""
    delta_noise_multiplier: float
    """Noise multiplier of the noise on the deltas."""

    def __init__(self, config: RunConfig, participation: Participation, noise_multipliers: torch.Tensor | None):
        super().__init__(config, config.privacy, config.privacy.accountant_name)
        self.cohort, self.population = config.federation.cohort, participation.population
        self.available = [participation.available(number) for number in range(self.rounds)]
        if not any(self.available):
            raise ConfigError("federation.participation.availability: no client is available in any round; give others")
        if noise_multipliers is None:
            noise = self._noise_for(lambda tried: self._releases(tried, self.rounds))
            noise_multipliers = torch.tensor([noise], dtype=torch.float64)
        self.noise_multipliers = noise_multipliers
        noise, adaptive = float(noise_multipliers), config.privacy.adaptive
        self.delta_noise_multiplier = noise
        if adaptive is not None:
            default = max(self.cohort / 20, noise)
            self.count_noise = default if adaptive.count_noise is None else adaptive.count_noise
            self.delta_noise_multiplier = accounting.delta_noise_multiplier(noise, self.count_noise)
        self.num_rounds = self._affordable_rounds()

    def epsilon(self, rounds: int) -> float:
        return self._spent(self._releases(float(self.noise_multipliers), rounds))

    def figures(self, rounds: int) -> dict[str, Any]:
        shares = {}
        if self.count_noise is not None:
            shares = {"delta_noise_multiplier": self.delta_noise_multiplier, "count_noise": self.count_noise}
        return self._figures(
            rounds,
            noise_multiplier=float(self.noise_multipliers),
            steps=rounds,
            sampling_probability=max(map(self._probability, self.available[:rounds]), default=0.0),
            **shares,
        )

    @property
    def warning(self) -> str | None:
        if self.privacy.dp_delta * self.population < 1:
            return None
        return (
            f"privacy.dp_delta: {self.privacy.dp_delta:g} is at least 1 / N for {self.population} clients, so a "
            "mechanism that sometimes publishes a client's delta would pass; give less than "
            f"{1 / self.population:.2g}"
        )

    def _releases(self, noise: float, rounds: int) -> Releases:
        """The releases of the first rounds. The events of later rounds have a count of 0."""
        counts = Counter(self.available[:rounds])
        return tuple((self._event(noise, clients), counts[clients]) for clients in sorted({*self.available} - {0}))

    def _event(self, noise: float, available: int) -> accounting.DpEvent:
        if self.privacy.sampling == "without_replacement":
            return accounting.without_replacement_event(noise, available, min(self.cohort, available))
        return accounting.gaussian_event(noise, self._probability(available))

    def _probability(self, available: int) -> float:
        return min(1.0, self.cohort / available) if available else 0.0
