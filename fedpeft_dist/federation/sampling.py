"""The order in which a round's candidates are asked: clients at random, drawn only as far as somebody looks.

Each sampler yields candidates in chunks, none of them twice. The available ones among them, in this order, are what the
server selects, so availability costs nothing for the clients that are never asked.

Shapes: N clients.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from fedpeft_dist.lanes.random import derive_seed

_FEW = 16
"""Until a 16th of the clients has been asked they are drawn one by one; then the rest at once, in O(N)."""


def uniform_order(population: int, chunk: int, seed: int, round_number: int) -> Iterator[np.ndarray]:
    """All clients in random order; the first chunk has the size given, each other is as large as all before it."""
    generator = random.Random(derive_seed(seed, "cohort", round_number))
    drawn = generator.sample(range(population), chunk)
    yield np.array(drawn, dtype=np.int64)
    seen = set(drawn)
    while _FEW * len(seen) < population:
        drawn, chunk = [], len(seen)
        while len(drawn) < chunk:
            client = generator.randrange(population)
            if client not in seen:
                seen.add(client)
                drawn.append(client)
        yield np.array(drawn, dtype=np.int64)
    order = np.random.default_rng(derive_seed(seed, "cohort rest", round_number))
    yield order.permutation(_without(np.arange(population), seen))


class WeightedOrder:
    """Clients drawn one after another without replacement, each time in proportion to the sizes of those left.

    Args:
        sizes: int64 [N]; a client of size 0 is never drawn.
    """

    def __init__(self, sizes: np.ndarray):
        self.sizes = sizes
        self.ends = np.cumsum(sizes)

    def __call__(self, chunk: int, seed: int, round_number: int) -> Iterator[np.ndarray]:
        generator = np.random.default_rng(derive_seed(seed, "weighted cohort", round_number))
        seen: set[int] = set()
        num_found = chunk
        # Once half of what is drawn has been drawn before, those seen hold most of the samples.
        while _FEW * len(seen) < len(self.sizes) and 2 * num_found >= chunk:
            # Drawn with replacement; to leave out what was drawn before is to draw from the rest in proportion.
            places = np.searchsorted(self.ends, generator.integers(self.ends[-1], size=2 * chunk), side="right")
            found = [client for client in dict.fromkeys(places.tolist()) if client not in seen]
            seen.update(found)
            yield np.array(found, dtype=np.int64)
            num_found, chunk = len(found), len(seen)
        rest = _without(np.flatnonzero(self.sizes), seen)
        # The same distribution at once: the order in which clocks ring, each as fast as its client is large.
        yield rest[np.argsort(generator.standard_exponential(len(rest)) / self.sizes[rest])]


def poisson_draw(population: int, probability: float, seed: int, round_number: int) -> np.ndarray:
    """Each client independently of the others: first how many there are, then which, so it costs O(M) alone."""
    key = derive_seed(seed, "poisson cohort", round_number)
    count = int(np.random.default_rng(key).binomial(population, probability))
    return np.array(random.Random(key).sample(range(population), count), dtype=np.int64)


def first_available(
    chunks: Iterable[np.ndarray], wanted: int, available: Callable[[np.ndarray], np.ndarray] | None
) -> np.ndarray:
    """The first so many candidates that are available, or as many as there are: int64.

    Args:
        available: which of some candidates are; None: all.
    """
    found: list[np.ndarray] = []
    for chunk in chunks:
        found.append(chunk if available is None else chunk[available(chunk)])
        if sum(map(len, found)) >= wanted:
            break
    return np.concatenate(found)[:wanted]


def _without(clients: np.ndarray, seen: set[int]) -> np.ndarray:
    left = np.ones(len(clients), dtype=bool)
    left[np.searchsorted(clients, np.fromiter(seen, dtype=np.int64, count=len(seen)))] = False
    return clients[left]
