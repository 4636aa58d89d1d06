"""A run's privacy plan: the noise, what the run has spent after each round, and how long its budget lasts.

Everything is known before training. Who takes part in which round, with how many local steps, follows from the config,
the seed and the round, and so does what is released. Clients' sizes, the schedule and the partition are public.
So it is also public which clients have samples. Only these clients are drawn.

Shapes: N clients.
"""

import math
import operator
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from dp_accounting import DpEvent

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.participation.plan import Participation
from fedpeft_dist.privacy import accounting
from fedpeft_dist.privacy.accounting import Releases

QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}
_NAMED = 5
"""Largest number of clients that a warning names."""


class PrivacyPlan(ABC):
    """The common part of the plans of all mechanisms with a guarantee."""

    num_rounds: int
    """`federation.rounds`, or fewer if `privacy.stop_at_epsilon` does not last for so many."""
    noise_multipliers: torch.Tensor
    """Noise multipliers, float64 on the CPU: [N] of the clients (0 for one that never takes part), or [1] of the
    server."""

    def __init__(self, config: RunConfig, accountant: accounting.AccountantName):
        self.privacy, self.accountant, self.rounds = config.privacy, accountant, config.federation.rounds
        noise = self.privacy.noise_multiplier
        if noise is not None and noise < accounting.SMALLEST_NOISE:
            raise ConfigError(
                f"privacy.noise_multiplier: {noise:g} is too little to account for; give at least "
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
        name, dp_delta, clip_norm = self.privacy.name, self.privacy.dp_delta, self.privacy.clip_norm
        spent = {"name": name, "epsilon": self.epsilon(rounds), "dp_delta": dp_delta}
        return {**spent, "accountant": self.accountant, "clip_norm": clip_norm, **figures}

    def _warning(self, clients: str, released: str, largest: int) -> str:
        return (
            f"privacy.dp_delta: {self.privacy.dp_delta:g} is at least {clients}, so a mechanism that sometimes "
            f"publishes {released}; give less than {1 / largest:.2g}"
        )

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
        target, limit, rounds = self.privacy.epsilon, self.privacy.stop_at_epsilon, self.rounds
        spent = self.epsilon(rounds)  # needed without a target, too: it refuses what cannot be accounted for
        if target is not None and spent > target:
            raise ConfigError(
                f"privacy.epsilon: {target:g} is less than the {spent:.4g} that federation.rounds: {rounds} would end "
                "at, with the noise that the run has begun with; give privacy.epsilon: "
                f"{math.ceil(100 * spent) / 100:g}, or fewer rounds"
            )
        if limit is None:
            return rounds
        if not (affordable := bisect_right(range(1, rounds + 1), limit, key=self.epsilon)):
            raise ConfigError(
                f"privacy.stop_at_epsilon: {limit:g} is less than the {self.epsilon(1):.4g} of the first round; give "
                "more, or a larger privacy.noise_multiplier"
            )
        return affordable


class _Kind(NamedTuple):
    """Clients that spend alike: their samples, their noise multiplier, and their local steps so far."""

    size: int
    noise: float
    steps: int


class SamplePlan(PrivacyPlan):
    """Sample-level privacy: each client adds noise of its own. Each of its local steps releases one noisy sum."""

    def __init__(self, config: RunConfig, participation: Participation, noise_multipliers: torch.Tensor | None):
        super().__init__(config, config.privacy.accountant)
        self.batch_size, self.sizes = config.client.batch_size, participation.partition.sizes()
        plans = [participation.plan(number).steps for number in range(self.rounds)]
        self.ends = np.cumsum([0, *map(len, plans)])
        self.clients = np.array([client for plan in plans for client in plan], dtype=np.int64)
        self.steps = np.array([steps for plan in plans for steps in plan.values()], dtype=np.int64)
        noise = np.zeros(len(self.sizes)) if noise_multipliers is None else noise_multipliers.numpy().copy()
        self.noise_multipliers = torch.from_numpy(noise)  # shares memory with `noise`
        for client, kind in enumerate(self._kinds(self.rounds)):
            if kind.steps and not kind.noise:
                noise[client] = self._noise_for(lambda tried, kind=kind: self._releases(kind._replace(noise=tried)))
        self.num_rounds = self._affordable_rounds()

    def epsilon(self, rounds: int) -> float:
        """The largest epsilon of a client.

        Clients that surely spend at most what another client spends are skipped. A client spends more with more steps,
        less noise and, unless batches are truncated, fewer samples.
        """
        front: list[_Kind] = []
        covers = operator.le if self.privacy.max_batch is None else operator.eq
        kinds = set(self._kinds(rounds, active=True))
        for kind in sorted(kinds, key=lambda kind: (-kind.steps, kind.noise, kind.size)):
            if not any(other.noise <= kind.noise and covers(other.size, kind.size) for other in front):
                front.append(kind)
        return max(map(self._epsilon_of, front), default=0.0)

    def figures(self, rounds: int) -> dict[str, Any]:
        kinds = self._kinds(rounds)
        sizes, noise, steps = map(np.array, zip(*kinds))
        takes_part = noise > 0
        columns = {
            # A client that spends less may be computed on a coarser grid, with a larger result.
            "epsilon": np.minimum(list(map(self._epsilon_of, kinds)), self.epsilon(rounds)),
            "noise_multiplier": noise,
            "steps": steps,
            "sampling_probability": np.minimum(1.0, self.batch_size / np.maximum(sizes, 1)) * takes_part,
        }
        order = np.lexsort((steps, noise, columns["epsilon"]))
        chosen = {label: order[round(at * (len(order) - 1))] for label, at in QUANTILES.items()}
        clients = {
            label: {name: column[client].item() for name, column in columns.items()} for label, client in chosen.items()
        }
        ranges = {
            name: [column[takes_part].min().item(), column[takes_part].max().item()] if takes_part.any() else [0, 0]
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
        clients = f"1 / n for {len(found)} of {len(self.sizes)} clients"
        return self._warning(clients, f"a sample would pass: {named}{more}", self.sizes[found].max())

    def _kinds(self, rounds: int, active: bool = False) -> list[_Kind]:
        """The kind of every client, or of those that have taken part, after so many rounds."""
        end = self.ends[rounds]
        steps = np.zeros(len(self.sizes), dtype=np.int64)
        np.add.at(steps, self.clients[:end], self.steps[:end])
        columns, chosen = (self.sizes, self.noise_multipliers.numpy(), steps), steps > 0 if active else slice(None)
        return list(map(_Kind, *(column[chosen].tolist() for column in columns)))

    def _epsilon_of(self, kind: _Kind) -> float:
        return self._spent(self._releases(kind)) if kind.steps else 0.0

    def _releases(self, kind: _Kind) -> Releases:
        probability, max_batch = min(1.0, self.batch_size / kind.size), self.privacy.max_batch
        return ((accounting.gaussian_event(kind.noise, probability, max_batch, kind.size), kind.steps),)


class UserPlan(PrivacyPlan):
    """User-level privacy: the server adds noise, and each round releases one noisy sum."""

    count_noise: float | None = None
    """Standard deviation of the noise on the number of unclipped deltas; None if the clipping norm is fixed."""
    delta_noise_multiplier: float
    """Noise multiplier of the noise on the deltas."""

    def __init__(self, config: RunConfig, participation: Participation, noise_multipliers: torch.Tensor | None):
        super().__init__(config, config.privacy.accountant_name)
        self.cohort, self.population = config.federation.cohort, participation.population
        self.available = [participation.available(number) for number in range(self.rounds)]
        if not any(self.available):
            raise ConfigError("federation.participation.availability: no client is available in any round; give others")
        if noise_multipliers is None:
            noise = self._noise_for(lambda tried: self._releases(tried, self.rounds))
            noise_multipliers = torch.tensor([noise], dtype=torch.float64)
        self.noise_multipliers = noise_multipliers
        self.delta_noise_multiplier = noise = float(noise_multipliers)
        if (adaptive := config.privacy.adaptive) is not None:
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
        return self._warning(f"1 / N for {self.population} clients", "a client's delta would pass", self.population)

    def _releases(self, noise: float, rounds: int) -> Releases:
        """The releases of the first rounds. The events of later rounds have a count of 0."""
        counts = Counter(self.available[:rounds])
        return tuple((self._event(noise, clients), counts[clients]) for clients in sorted({*self.available} - {0}))

    def _event(self, noise: float, available: int) -> DpEvent:
        if self.privacy.sampling == "without_replacement":
            return accounting.without_replacement_event(noise, available, min(self.cohort, available))
        return accounting.gaussian_event(noise, self._probability(available))

    def _probability(self, available: int) -> float:
        return min(1.0, self.cohort / available) if available else 0.0


def make_privacy_plan(
    config: RunConfig, participation: Participation, noise_multipliers: torch.Tensor | None = None
) -> PrivacyPlan | None:
    """The plan of a run; None if its privacy is not accounted for.

    Args:
        noise_multipliers: those that the run has begun with. They stay; a client that has none and takes part now gets
            one.

    Raises:
        ConfigError: no noise meets the target, the stored noise fails it, or the first round exceeds the budget.
    """
    make = {"sample": SamplePlan, "user": UserPlan}.get(config.privacy.name)
    return None if make is None else make(config, participation, noise_multipliers)
