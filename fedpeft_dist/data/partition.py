"""Partitions: which client holds which training samples.

Shapes: N clients, S training samples, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedpeft_dist.config import schema
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.data.splits import SPLITS
from fedpeft_dist.lanes.random import derive_seed, permutation


@dataclass(frozen=True)
class IndexPartition:
    """Every client has its own samples, listed one client after another.

    Only `largest_total`, `sizes` and `holders` cost O(N).
    """

    offsets: np.ndarray
    """int64 [N + 1]."""
    samples: torch.Tensor
    """int64, the sum of all sizes."""

    @classmethod
    def from_lists(cls, lists: Sequence[np.ndarray]) -> "IndexPartition":
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in lists], dtype=np.int64)])
        return cls(offsets, torch.from_numpy(np.concatenate(lists).astype(np.int64)))

    @property
    def num_clients(self) -> int:
        return len(self.offsets) - 1

    def size(self, client: int) -> int:
        """The number of samples of a client."""
        return int(self.offsets[client + 1] - self.offsets[client])

    def indices(self, client: int) -> torch.Tensor:
        """The samples of a client: int64 [size]."""
        return self.samples[self.offsets[client] : self.offsets[client + 1]]

    def largest_total(self, num_clients: int) -> int:
        """The number of samples that the largest clients have together."""
        return int(np.sort(self.sizes())[-num_clients:].sum())

    def sizes(self) -> np.ndarray:
        """The size of every client: int64 [N]."""
        return np.diff(self.offsets)

    def holders(self) -> np.ndarray | None:
        """The clients that have samples, ascending, int64; None if all clients have some."""
        found = np.flatnonzero(self.sizes())
        return None if len(found) == self.num_clients else found


@dataclass(frozen=True)
class SharedPoolPartition:
    """Client k reads a window of a shared pool, at an offset computed from k. Clients need no memory.

    The methods are those of `IndexPartition`.
    """

    num_clients: int
    samples_per_client: int
    pool: int
    """The number of samples in the pool."""

    def size(self, client: int) -> int:
        return self.samples_per_client

    def indices(self, client: int) -> torch.Tensor:
        start = client * self.samples_per_client
        return torch.arange(start, start + self.samples_per_client) % self.pool

    def largest_total(self, num_clients: int) -> int:
        return num_clients * self.samples_per_client

    def sizes(self) -> np.ndarray:
        return np.broadcast_to(np.int64(self.samples_per_client), (self.num_clients,))  # one number in memory

    def holders(self) -> None:
        return None


Partition = IndexPartition | SharedPoolPartition


def make_partition(config: schema.DataConfig, train: ImageSet, seed: int) -> Partition:
    """Splits the training samples as the config's partition says.

    Raises:
        ConfigError: the partition is impossible: more clients than samples, a minimum that no draw meets, ...
    """
    if isinstance(config.partition, schema.PoolPartition):
        return SharedPoolPartition(config.clients, config.partition.samples, len(train))
    if config.clients is not None and config.clients > len(train):
        raise ConfigError(f"data.clients: {config.clients} is more than the {len(train)} training samples")
    split = SPLITS[type(config.partition)]
    rng = np.random.default_rng(derive_seed(seed, "partition"))
    return IndexPartition.from_lists([np.sort(part) for part in split(config, train, rng)])


def hold_out(partition: IndexPartition, share: float, seed: int) -> tuple[IndexPartition, IndexPartition]:
    """Sets a random share of every client's samples aside, and returns (the rest, the held-out samples).

    A client keeps at least one sample.
    """
    kept, held = [], []
    for client in range(partition.num_clients):
        own = partition.indices(client)
        order = own[permutation(derive_seed(seed, "validation", client), len(own))].numpy()
        count = min(round(share * len(own)), max(len(own) - 1, 0))
        held.append(np.sort(order[:count]))
        kept.append(np.sort(order[count:]))
    return IndexPartition.from_lists(kept), IndexPartition.from_lists(held)


def class_counts(partition: Partition, labels: torch.Tensor, num_classes: int, max_clients: int) -> np.ndarray:
    """The number of samples of each class that the first clients have: int64 [min(N, max_clients), K]."""
    rows = [
        torch.bincount(labels[partition.indices(client)], minlength=num_classes)
        for client in range(min(partition.num_clients, max_clients))
    ]
    return torch.stack(rows).numpy()
