"""Who takes part in a round."""

from __future__ import annotations

import random

from fedpeft_dist.config.schema import ParticipationConfig
from fedpeft_dist.lanes.random import derive_seed


def sample_cohort(config: ParticipationConfig, population: int, cohort: int, seed: int, round_number: int) -> list[int]:
    """The cohort of a round: `cohort` clients, uniformly and without replacement, in O(cohort).

    Every rank computes the same; nothing is sent.
    """
    generator = random.Random(derive_seed(seed, "cohort", round_number))
    return sorted(generator.sample(range(population), cohort))
