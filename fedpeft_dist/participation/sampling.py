"""A round's clients at random, in the order drawn, and only as far as somebody looks.

Candidates are drawn in chunks, none of them twice; the available ones among them, in this order, are what the server
selects. So clients that are never drawn cost nothing, and availability is asked of a few: O(M), where more than a few
of all are available.

Shapes: N clients.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import numpy as np

from fedpeft_dist.lanes.random import derive_seed

Available: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Those of some clients, int64, that are available, in the same order. Draws that do not ask for sizes take clients by
their places among those that can be drawn, and get their numbers back."""
_FEW = 64
"""Until a 64th of the clients has been drawn they come one by one; then the rest at once, in O(N)."""


def uniform_order(
    population: int, chunk: int, seed: int, round_number: int, available: Available
) -> Iterator[np.ndarray]:
    """All available clients in random order.

    Args:
        chunk: how many candidates to draw first; each further time it is as many as all before.
    """
    generator = random.Random(derive_seed(seed, "cohort", round_number))
    drawn = generator.sample(range(population), chunk)
    yield available(np.array(drawn, dtype=np.int64))
    seen = set(drawn)
    while _FEW * len(seen) < population:
        drawn, chunk = [], len(seen)
        while len(drawn) < chunk:
            client = generator.randrange(population)
            if client not in seen:
                seen.add(client)
                drawn.append(client)
        yield available(np.array(drawn, dtype=np.int64))
    order = np.random.default_rng(derive_seed(seed, "cohort rest", round_number))
    yield order.permutation(available(_without(np.arange(population), seen)))


class WeightedOrder:
    """Clients drawn one after another without replacement, each time in proportion to the sizes of those left.

    Args:
        sizes: int64 [N]; a client of size 0 is never drawn.
    """

    def __init__(self, sizes: np.ndarray):
        self.sizes = sizes
        self.ends = np.cumsum(sizes)

    def __call__(self, chunk: int, seed: int, round_number: int, available: Available) -> Iterator[np.ndarray]:
        generator = np.random.default_rng(derive_seed(seed, "weighted cohort", round_number))
        seen: set[int] = set()
        is_fruitful = True
        # Once half of what is drawn has been drawn before, those seen hold most of the samples.
        while _FEW * len(seen) < len(self.sizes) and is_fruitful:
            # Drawn with replacement; to leave out what was drawn before is to draw from the rest in proportion.
            places = np.searchsorted(self.ends, generator.integers(self.ends[-1], size=chunk), side="right")
            found = [client for client in dict.fromkeys(places.tolist()) if client not in seen]
            seen.update(found)
            yield available(np.array(found, dtype=np.int64))
            is_fruitful, chunk = 2 * len(found) >= chunk, len(seen)
        rest = available(_without(np.flatnonzero(self.sizes), seen))
        # The same distribution at once: the order in which clocks ring, each as fast as its client is large.
        yield rest[np.argsort(generator.standard_exponential(len(rest)) / self.sizes[rest])]


def poisson_draw(population: int, probability: float, seed: int, round_number: int, available: Available) -> np.ndarray:
    """Each available client independently of the others: first how many there are, then which, in O(M)."""
    key = derive_seed(seed, "poisson cohort", round_number)
    count = int(np.random.default_rng(key).binomial(population, probability))
    return available(np.array(random.Random(key).sample(range(population), count), dtype=np.int64))


def first(chunks: Iterable[np.ndarray], wanted: int) -> np.ndarray:
    """The first so many clients of some chunks, or as many as there are: int64."""
    found: list[np.ndarray] = []
    for chunk in chunks:
        found.append(chunk)
        if sum(map(len, found)) >= wanted:
            break
    return np.concatenate(found)[:wanted]


def _without(clients: np.ndarray, seen: set[int]) -> np.ndarray:
    left = np.ones(len(clients), dtype=bool)
    left[np.searchsorted(clients, np.fromiter(seen, dtype=np.int64, count=len(seen)))] = False
    return clients[left]
