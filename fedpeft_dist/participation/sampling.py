"""Draws of a round's clients at random. A draw goes on only as long as the server wants more clients.

Candidates are drawn in chunks, each client at most once. The server selects the available candidates in this order.
Clients that are never drawn cost nothing, and few are asked whether they are available. So a draw costs O(M) if more
than a few clients are available.

Shapes: N clients, M cohort.
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from fedpeft_dist.lanes.random import derive_seed

_FEW = 64
"""Clients are drawn one by one until a 64th of the population is drawn. Then the rest is drawn at once, in O(N)."""


class Draw(NamedTuple):
    """The seed, the round and the availability of a draw."""

    seed: int
    round_number: int
    available: Callable[[np.ndarray], np.ndarray]
    """Filter that keeps the available clients, int64, in their order. Draws that do not look at sizes pass the places
    of clients in the population, and get the clients' numbers back."""

    def key(self, purpose: str) -> int:
        """The seed of one purpose in this round."""
        return derive_seed(self.seed, purpose, self.round_number)


def uniform_order(population: int, chunk: int, draw: Draw) -> Iterator[np.ndarray]:
    """All available clients in random order.

    Args:
        chunk: size of the first chunk of candidates. Each later chunk is as large as all chunks before it.
    """
    generator = random.Random(draw.key("cohort"))
    drawn = generator.sample(range(population), chunk)
    seen = set(drawn)
    yield draw.available(np.array(drawn, dtype=np.int64))
    while _FEW * len(seen) < population:
        drawn, chunk = [], len(seen)
        while len(drawn) < chunk:
            if (client := generator.randrange(population)) not in seen:
                seen.add(client)
                drawn.append(client)
        yield draw.available(np.array(drawn, dtype=np.int64))
    order = np.random.default_rng(draw.key("cohort rest"))
    yield order.permutation(draw.available(_without(np.arange(population), seen)))


def weighted_order(ends: np.ndarray, chunk: int, draw: Draw) -> Iterator[np.ndarray]:
    """Clients drawn one after another without replacement, in proportion to the sizes of the clients that are left.

    Args:
        ends: sum of the samples of each client and of all clients before it, int64 [N]. A client of size 0 is never
            drawn.
        chunk: size of the first chunk of candidates.
    """
    generator = np.random.default_rng(draw.key("weighted cohort"))
    seen: set[int] = set()
    is_fruitful = True
    # If half of a chunk has been drawn before, the clients seen hold most of the samples. Then the loop ends.
    while _FEW * len(seen) < len(ends) and is_fruitful:
        # Draw with replacement and skip repeated clients: this draws from the rest in proportion to size.
        places = np.searchsorted(ends, generator.integers(ends[-1], size=chunk), side="right")
        found = [client for client in dict.fromkeys(places.tolist()) if client not in seen]
        seen.update(found)
        yield draw.available(np.array(found, dtype=np.int64))
        is_fruitful, chunk = 2 * len(found) >= chunk, len(seen)
    sizes = np.diff(ends, prepend=0)
    rest = draw.available(_without(np.flatnonzero(sizes), seen))
    # Sorting by exponential times, each with the client's size as its rate, gives the same distribution at once.
    yield rest[np.argsort(generator.standard_exponential(len(rest)) / sizes[rest])]


def poisson_draw(population: int, probability: float, draw: Draw) -> np.ndarray:
    """Each available client, independently of all others. Drawing the count first costs O(M)."""
    key = draw.key("poisson cohort")
    count = int(np.random.default_rng(key).binomial(population, probability))
    return draw.available(np.array(random.Random(key).sample(range(population), count), dtype=np.int64))


def first(chunks: Iterator[np.ndarray], wanted: int) -> np.ndarray:
    """The first `wanted` clients of some chunks, or all if there are fewer: int64."""
    found = [next(chunks)]
    while sum(map(len, found)) < wanted and (chunk := next(chunks, None)) is not None:
        found.append(chunk)
    return np.concatenate(found)[:wanted]


def _without(clients: np.ndarray, seen: set[int]) -> np.ndarray:
    """The clients, ascending, that are not in `seen`."""
    return np.delete(clients, np.searchsorted(clients, np.fromiter(seen, dtype=np.int64, count=len(seen))))
