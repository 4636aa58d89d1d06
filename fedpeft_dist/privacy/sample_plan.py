"""The plan of sample-level privacy: each client adds noise of its own, and spends by itself.

Shapes: N clients.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.participation.plan import Participation
from fedpeft_dist.privacy import accounting
from fedpeft_dist.privacy.accounting import Releases
from fedpeft_dist.privacy.budget import PrivacyPlan

QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}
_NAMED = 5
"""Largest number of clients that a warning names."""


class _Kind(NamedTuple):
    """Clients that spend alike."""

    size: int
    """Samples of each client."""
    noise: float
    """Noise multiplier."""
    steps: int
    """Local steps so far."""


class SamplePlan(PrivacyPlan):
    """Each local step of a client releases one noisy sum.

    Args:
        noise_multipliers: float64 [N], those that the run has begun with, or None.
    """

    def __init__(self, config: RunConfig, participation: Participation, noise_multipliers: torch.Tensor | None):
        super().__init__(config, config.privacy, config.privacy.accountant)
        self.batch_size, self.sizes = config.client.batch_size, participation.partition.sizes()
        plans = [participation.plan(number).steps for number in range(self.rounds)]
        self.ends = np.cumsum([0, *map(len, plans)])
        self.clients = np.array([client for plan in plans for client in plan], dtype=np.int64)
        self.steps = np.array([steps for plan in plans for steps in plan.values()], dtype=np.int64)
        noise = np.zeros(len(self.sizes)) if noise_multipliers is None else noise_multipliers.numpy().copy()
        steps = self._steps(self.rounds)
        for client in np.flatnonzero((steps > 0) & (noise == 0)):
            kind = _Kind(int(self.sizes[client]), 0.0, int(steps[client]))
            noise[client] = self._noise_for(lambda tried, kind=kind: self._releases(kind._replace(noise=tried)))
        self.noise_multipliers = torch.from_numpy(noise)
        self.num_rounds = self._affordable_rounds()

    def epsilon(self, rounds: int) -> float:
        steps = self._steps(rounds)
        return max(map(self._epsilon_of, self._front(set(self._kinds(steps, steps > 0)))), default=0.0)

    def figures(self, rounds: int) -> dict[str, Any]:
        steps, noise = self._steps(rounds), self.noise_multipliers.numpy()
        takes_part = noise > 0
        epsilons = list(map(self._epsilon_of, self._kinds(steps, slice(None))))
        probabilities = [self._probability(size) if takes else 0.0 for size, takes in zip(self.sizes, takes_part)]
        columns = {
            # A client that spends less may be computed on a coarser grid, with a larger result.
            "epsilon": np.minimum(epsilons, self.epsilon(rounds)),
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
        return (
            f"privacy.dp_delta: {self.privacy.dp_delta:g} is at least 1 / n for {len(found)} of {len(self.sizes)} "
            f"clients, so a mechanism that sometimes publishes a sample would pass: {named}{more}; give less than "
            f"{1 / self.sizes[found].max():.2g}"
        )

    def _steps(self, rounds: int) -> np.ndarray:
        """The local steps of every client in the first rounds: int64 [N]."""
        end = self.ends[rounds]
        steps = np.zeros(len(self.sizes), dtype=np.int64)
        np.add.at(steps, self.clients[:end], self.steps[:end])
        return steps

    def _kinds(self, steps: np.ndarray, clients: np.ndarray | slice) -> list[_Kind]:
        """The kind of each of these clients, if the clients have taken so many local steps [N]."""
        columns = (self.sizes, self.noise_multipliers.numpy(), steps)
        return list(map(_Kind, *(column[clients].tolist() for column in columns)))

    def _front(self, kinds: Iterable[_Kind]) -> list[_Kind]:
        """The kinds without those that surely spend at most what another kind spends.

        A kind spends more with fewer samples, less noise and more steps.
        """
        front: list[_Kind] = []
        for kind in sorted(kinds, key=lambda kind: (-kind.steps, kind.noise, kind.size)):
            if not any(other.noise <= kind.noise and self._exposes(other, kind) for other in front):
                front.append(kind)
        return front

    def _exposes(self, one: _Kind, other: _Kind) -> bool:
        """Whether a step of `one` reveals at least as much of a sample as a step of `other`, at equal noise."""
        return one.size <= other.size if self.privacy.max_batch is None else one.size == other.size

    def _epsilon_of(self, kind: _Kind) -> float:
        return self._spent(self._releases(kind)) if kind.steps else 0.0

    def _releases(self, kind: _Kind) -> Releases:
        probability, max_batch = self._probability(kind.size), self.privacy.max_batch
        return ((accounting.gaussian_event(kind.noise, probability, max_batch, kind.size), kind.steps),)

    def _probability(self, size: int) -> float:
        return min(1.0, self.batch_size / int(size))
