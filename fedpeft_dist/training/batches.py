"""How a client draws the batch of each local step from its samples."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch

from fedpeft_dist.lanes.random import derive_seed, fold_in, permutation, random_bits, unit_interval
from fedpeft_dist.privacy.mechanisms import secure_bits


@dataclass(frozen=True)
class EpochBatches:
    """Goes through all samples in a new random order in each local epoch."""

    batch_size: int
    seed: int

    def of(self, samples: torch.Tensor, client: int, round_number: int) -> Iterator[torch.Tensor]:
        """The batches of a client in a round, one for each local step, without end: int64, at most [B] each.

        They depend on the seed, the round and the client alone; samples are int64 [n] indices into the training set.
        """
        for epoch in count():
            key = derive_seed(self.seed, "order", round_number, client, epoch)
            yield from samples[permutation(key, len(samples))].split(self.batch_size)


@dataclass(frozen=True)
class PoissonBatches(EpochBatches):
    """Draws each sample by itself with probability q = min(1, batch_size / n), so batches differ in size.

    Args:
        seed: the secret that draws follow from. Whoever knows it knows which samples took part.
        max_batch: a larger batch is cut to a random subset of this size.
        secure: draw from the operating system's randomness instead of the seed.
    """

    max_batch: int | None = None
    secure: bool = False

    def of(self, samples: torch.Tensor, client: int, round_number: int) -> Iterator[torch.Tensor]:
        secret = derive_seed(self.seed, "client", round_number, client)
        for step in count():
            yield self.draw(samples, derive_seed(secret, "draw", step))

    def expected(self, num_samples: int) -> float:
        """The expected batch size of a client with n samples, which a sum of gradients is divided by."""
        expected = min(self.batch_size, num_samples)
        return expected if self.max_batch is None else min(expected, self.max_batch)

    def draw(self, samples: torch.Tensor, key: int) -> torch.Tensor:
        """The batch of one step, in the order of the client's samples."""
        probability = min(1.0, self.batch_size / len(samples))
        chosen = samples[self._uniform(len(samples), key) < probability]
        if self.max_batch is None or len(chosen) <= self.max_batch:
            return chosen
        subset = int(secure_bits((1,))) if self.secure else derive_seed(key, "subset")
        return chosen[permutation(subset, len(chosen))[: self.max_batch].sort().values]

    def _uniform(self, size: int, key: int) -> torch.Tensor:
        if self.secure:
            return unit_interval(secure_bits((size,)))
        return unit_interval(random_bits(fold_in(torch.tensor(key), torch.arange(size))))
