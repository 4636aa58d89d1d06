"""What a run spends of its privacy budget, and the noise it needs for that, before anything is trained.

Who takes part in which round, with how many local steps, follows from the config, the seed and the round; so does what
is released. Sizes, schedule and partition are public, and with them which clients have samples: no other is ever drawn.

Shapes: N clients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import AccountedPrivacy, RunConfig, SamplePrivacy, UserPrivacy
from fedpeft_dist.participation.plan import Participation
from fedpeft_dist.privacy import accounting
from fedpeft_dist.privacy.accounting import Releases

QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}
_NAMED = 5


class PrivacyPlan(ABC):
    """
    Raises:
        ConfigError: a target that no noise meets, a budget that does not last for one round.
    """

    num_rounds: int
    """`federation.rounds`, or as many as `privacy.stop_at_epsilon` lasts for."""
    noise_multipliers: torch.Tensor
    """Float64, on the CPU: [N] of the clients, 0 where one never takes part, or [1] of the server."""

    def __init__(self, config: RunConfig, privacy: AccountedPrivacy, accountant: accounting.AccountantName):
        self.privacy, self.accountant, self.rounds = privacy, accountant, config.federation.rounds
        if privacy.noise_multiplier is not None and privacy.noise_multiplier < accounting.SMALLEST_NOISE:
            raise ConfigError(
                f"privacy.noise_multiplier: {privacy.noise_multiplier:g} is too little to account for; give at least "
                f"{accounting.SMALLEST_NOISE:g}"
            )

    @abstractmethod
    def epsilon(self, rounds: int) -> float:
        """What so many rounds have spent; where clients spend by themselves, the one that has spent most."""

    @abstractmethod
    def figures(self, rounds: int) -> dict[str, Any]:
        """For JSON, after so many rounds: name, epsilon, dp_delta, noise_multiplier, steps, sampling_probability,
        accountant, clip_norm. Where clients differ, these are the numbers of the one whose epsilon is the largest. Then
        `clients` has one client's numbers for each quantile of epsilon over all clients (0 of one that never takes
        part), and `ranges` the least and the largest of each number over those that take part."""

    @property
    @abstractmethod
    def warning(self) -> str | None:
        """A line where dp_delta is so large that it means little."""

    def _figures(self, rounds: int, **figures: Any) -> dict[str, Any]:
        privacy = self.privacy
        shared = {"dp_delta": privacy.dp_delta, "accountant": self.accountant, "clip_norm": privacy.clip_norm}
        return {"name": privacy.name, "epsilon": self.epsilon(rounds), **shared, **figures}

    def _spent(self, releases: Releases) -> float:
        return accounting.epsilon(releases, self.privacy.dp_delta, self.accountant)

    def _budget(self) -> int:
        """`num_rounds`, once the noise is known."""
        privacy, rounds = self.privacy, self.rounds
        spent = self.epsilon(rounds)  # also where nothing limits it: what cannot be accounted for is refused now
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


class _Kind(NamedTuple):
    """Clients that spend alike."""

    size: int
    """Samples of each."""
    noise: float
    steps: int


class SamplePlan(PrivacyPlan):
    """Each client adds noise of its own, and releases one noisy sum in each of its local steps."""

    def __init__(self, config: RunConfig, participation: Participation, noise_multipliers: torch.Tensor | None):
        privacy = config.privacy
        super().__init__(config, privacy, privacy.accountant)
        self.batch_size, self.sizes = config.client.batch_size, participation.partition.sizes()
        plans = [participation.plan(number).steps for number in range(self.rounds)]
        self.ends = np.cumsum([0, *map(len, plans)])
        self.clients = np.array([client for plan in plans for client in plan], dtype=np.int64)
        self.steps = np.array([steps for plan in plans for steps in plan.values()], dtype=np.int64)
        noise = np.zeros(len(self.sizes)) if noise_multipliers is None else noise_multipliers.numpy().copy()
        steps = self._steps(self.rounds)
        for client in np.flatnonzero((steps > 0) & (noise == 0)):
            noise[client] = self._noise_for(int(self.sizes[client]), int(steps[client]))
        self.noise_multipliers = torch.from_numpy(noise)
        self.num_rounds = self._budget()

    def epsilon(self, rounds: int) -> float:
        return max(map(self._epsilon_of, self._front(self._kinds(rounds))), default=0.0)

    def figures(self, rounds: int) -> dict[str, Any]:
        steps = self._steps(rounds)
        noise = self.noise_multipliers.numpy()
        taking_part = noise > 0
        epsilons = [self._epsilon_of(kind) for kind in self._kinds(rounds, every_client=True)]
        probabilities = [self._probability(size) if takes else 0.0 for size, takes in zip(self.sizes, taking_part)]
        columns = {
            "epsilon": np.minimum(epsilons, self.epsilon(rounds)),  # who exposes less may have the coarser grid
            "noise_multiplier": noise,
            "steps": steps,
            "sampling_probability": np.array(probabilities),
        }
        order = np.lexsort((steps, noise, columns["epsilon"]))
        chosen = {label: order[round(at * (len(order) - 1))] for label, at in QUANTILES.items()}
        clients = {
            label: {name: column[client].item() for name, column in columns.items()} for label, client in chosen.items()
        }
        ranges = {
            name: [column[taking_part].min().item(), column[taking_part].max().item()] if taking_part.any() else [0, 0]
            for name, column in columns.items()
        }
        return self._figures(rounds, **clients["max"], clients=clients, ranges=ranges)

    @property
    def warning(self) -> str | None:
        found = np.flatnonzero((self.noise_multipliers.numpy() > 0) & (self.privacy.dp_delta * self.sizes >= 1))
        if not len(found):
            return None
        named = ", ".join(f"{client} ({self.sizes[client]} samples)" for client in found[:_NAMED])
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        return (
            f"privacy.dp_delta: {self.privacy.dp_delta:g} is at least 1 / n for {len(found)} of {len(self.sizes)} "
            f"clients, so that publishing a sample now and then would pass: {named}{more}; give less than "
            f"{1 / self.sizes[found].max():.2g}"
        )

    def _steps(self, rounds: int) -> np.ndarray:
        """The local steps of every client in the first rounds: int64 [N]."""
        end = self.ends[rounds]
        steps = np.zeros(len(self.sizes), dtype=np.int64)
        np.add.at(steps, self.clients[:end], self.steps[:end])
        return steps

    def _kinds(self, rounds: int, every_client: bool = False) -> list[_Kind]:
        """The different ones, or those of all clients in turn."""
        steps, noise = self._steps(rounds), self.noise_multipliers.numpy()
        clients = np.arange(len(steps)) if every_client else np.flatnonzero(steps)
        kinds = map(_Kind, self.sizes[clients].tolist(), noise[clients].tolist(), steps[clients].tolist())
        return list(kinds) if every_client else list(set(kinds))

    def _front(self, kinds: Iterable[_Kind]) -> list[_Kind]:
        """Without those that spend at most what another one does: it has fewer samples, less noise and more steps."""
        front: list[_Kind] = []
        for kind in sorted(kinds, key=lambda kind: (-kind.steps, kind.noise, kind.size)):
            if not any(other.noise <= kind.noise and self._exposes(other, kind) for other in front):
                front.append(kind)
        return front

    def _exposes(self, one: _Kind, other: _Kind) -> bool:
        """Whether a step of one reveals as much of a sample, at equal noise."""
        return one.size <= other.size if self.privacy.max_batch is None else one.size == other.size

    def _epsilon_of(self, kind: _Kind) -> float:
        return self._spent(self._releases(*kind)) if kind.steps else 0.0

    def _noise_for(self, size: int, steps: int) -> float:
        privacy = self.privacy
        if privacy.epsilon is None:
            return privacy.noise_multiplier
        return accounting.calibrate(
            lambda noise: self._releases(size, noise, steps), privacy.epsilon, privacy.dp_delta, self.accountant
        )

    def _releases(self, size: int, noise: float, steps: int) -> Releases:
        event = accounting.gaussian_event(noise, self._probability(size), self.privacy.max_batch, size)
        return ((event, steps),)

    def _probability(self, size: int) -> float:
        return min(1.0, self.batch_size / int(size))


class UserPlan(PrivacyPlan):
    """The server adds noise, and releases one noisy sum a round."""

    def __init__(self, config: RunConfig, participation: Participation, noise_multipliers: torch.Tensor | None):
        privacy = config.privacy
        super().__init__(config, privacy, privacy.accountant_name)
        self.cohort, self.population = config.federation.cohort, participation.population
        self.available = [participation.available(number) for number in range(self.rounds)]
        if not any(self.available):
            raise ConfigError("federation.participation.availability: no client is available in any round; give others")
        if noise_multipliers is None:
            noise_multipliers = torch.tensor([self._noise()], dtype=torch.float64)
        self.noise_multipliers = noise_multipliers
        noise, adaptive = float(noise_multipliers), privacy.adaptive
        self.count_noise: float | None = None
        """Standard deviation of the noise on the number of unclipped deltas; None where the clipping norm stays."""
        self.delta_noise_multiplier = noise
        """Of the noise on the deltas."""
        if adaptive is not None:
            default = max(self.cohort / 20, noise)
            self.count_noise = default if adaptive.count_noise is None else adaptive.count_noise
            self.delta_noise_multiplier = accounting.delta_noise_multiplier(noise, self.count_noise)
        self.num_rounds = self._budget()

    def epsilon(self, rounds: int) -> float:
        return self._spent(self._releases(float(self.noise_multipliers), rounds))

    def figures(self, rounds: int) -> dict[str, Any]:
        probability = max(map(self._probability, self.available[:rounds]), default=0.0)
        shares = {}
        if self.count_noise is not None:
            shares = {"delta_noise_multiplier": self.delta_noise_multiplier, "count_noise": self.count_noise}
        return self._figures(
            rounds,
            noise_multiplier=float(self.noise_multipliers),
            steps=rounds,
            sampling_probability=probability,
            **shares,
        )

    @property
    def warning(self) -> str | None:
        if self.privacy.dp_delta * self.population < 1:
            return None
        return (
            f"privacy.dp_delta: {self.privacy.dp_delta:g} is at least 1 / N for {self.population} clients, so that "
            f"publishing a client's delta now and then would pass; give less than {1 / self.population:.2g}"
        )

    def _noise(self) -> float:
        privacy = self.privacy
        if privacy.epsilon is None:
            return privacy.noise_multiplier
        return accounting.calibrate(
            lambda noise: self._releases(noise, self.rounds), privacy.epsilon, privacy.dp_delta, self.accountant
        )

    def _releases(self, noise: float, rounds: int) -> Releases:
        """Of the first rounds, those of the others with a count of 0."""
        counts = Counter(self.available[:rounds])
        return tuple((self._event(noise, clients), counts[clients]) for clients in sorted({*self.available} - {0}))

    def _event(self, noise: float, available: int) -> accounting.DpEvent:
        if self.privacy.sampling == "without_replacement":
            return accounting.without_replacement_event(noise, available, min(self.cohort, available))
        return accounting.gaussian_event(noise, self._probability(available))

    def _probability(self, available: int) -> float:
        return min(1.0, self.cohort / available) if available else 0.0


def make_privacy_plan(
    config: RunConfig, participation: Participation, noise_multipliers: torch.Tensor | None = None
) -> PrivacyPlan | None:
    """None where nothing is accounted for.

    Args:
        noise_multipliers: those that the run has begun with, which stay; who had none, and takes part now, gets one.

    Raises:
        ConfigError: a target that no noise meets, or that the stored noise fails; a budget that the first round
            exceeds.
    """
    match config.privacy:
        case SamplePrivacy():
            return SamplePlan(config, participation, noise_multipliers)
        case UserPrivacy():
            return UserPlan(config, participation, noise_multipliers)
    return None
