"""Which client holds which training samples.

Shapes: N clients, S training samples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fedpeft_dist.config import schema
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.lanes.random import derive_seed, permutation

MAX_DRAWS = 1000


class Partition(Protocol):
    """What a run needs to know of it; no method costs O(N) but `largest_total`."""

    num_clients: int

    def size(self, client: int) -> int:
        """Samples that a client trains on."""

    def indices(self, client: int) -> torch.Tensor:
        """They themselves: int64 [size]."""

    def largest_total(self, num_clients: int) -> int:
        """The samples of that many clients, the largest ones."""


@dataclass(frozen=True)
class IndexPartition:
    """Every client has samples of its own, listed one client after another."""

    offsets: np.ndarray
    """int64 [N + 1]."""
    samples: torch.Tensor
    """int64 [sum of the sizes]."""

    @classmethod
    def from_lists(cls, lists: Sequence[np.ndarray]) -> IndexPartition:
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in lists], dtype=np.int64)])
        return cls(offsets, torch.from_numpy(np.concatenate(lists).astype(np.int64)))

    @property
    def num_clients(self) -> int:
        return len(self.offsets) - 1

    def size(self, client: int) -> int:
        return int(self.offsets[client + 1] - self.offsets[client])

    def indices(self, client: int) -> torch.Tensor:
        return self.samples[self.offsets[client] : self.offsets[client + 1]]

    def largest_total(self, num_clients: int) -> int:
        return int(np.sort(np.diff(self.offsets))[-num_clients:].sum())


@dataclass(frozen=True)
class SharedPoolPartition:
    """Client k reads a window of a shared pool, at an offset computed from k: any number of clients cost nothing."""

    num_clients: int
    samples_per_client: int
    pool: int
    """Samples in the pool."""

    def size(self, client: int) -> int:
        return self.samples_per_client

    def indices(self, client: int) -> torch.Tensor:
        start = client * self.samples_per_client
        return torch.arange(start, start + self.samples_per_client) % self.pool

    def largest_total(self, num_clients: int) -> int:
        return num_clients * self.samples_per_client


def make_partition(config: schema.DataConfig, train: ImageSet, seed: int) -> Partition:
    """Splits the training samples as the config's partition says.

    Raises:
        ConfigError: a partition that cannot be: more clients than samples, a minimum that no draw meets, ...
    """
    if isinstance(config.partition, schema.PoolPartition):
        return SharedPoolPartition(config.clients, config.partition.samples, len(train))
    if config.clients is not None and config.clients > len(train):
        raise ConfigError(f"data.clients: {config.clients} is more than the {len(train)} training samples")
    split = PARTITIONS[type(config.partition)]
    rng = np.random.default_rng(derive_seed(seed, "partition"))
    return IndexPartition.from_lists(split(config, train, rng))


def hold_out(partition: IndexPartition, share: float, seed: int) -> tuple[IndexPartition, IndexPartition]:
    """Sets a share of every client's samples aside, chosen at random: (what is left, what is held out).

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
    """How many samples of each class the first clients have: int64 [min(N, max_clients), K]."""
    rows = [
        torch.bincount(labels[partition.indices(client)], minlength=num_classes)
        for client in range(min(partition.num_clients, max_clients))
    ]
    return torch.stack(rows).numpy()


def _split_iid(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    return [np.sort(part) for part in np.array_split(rng.permutation(len(train)), config.clients)]


def _split_dirichlet(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    """Each class is dealt out by its own draw from Dir(alpha, ..., alpha) (Hsu et al. 2019, arXiv 1909.06335)."""
    partition, clients = config.partition, config.clients
    where = f"data.partition.min_samples: {partition.min_samples}"
    if partition.min_samples * clients > len(train):
        raise ConfigError(f"{where} for {clients} clients needs more than the {len(train)} training samples")
    labels = train.labels.numpy()
    sizes = np.bincount(labels)
    for _ in range(MAX_DRAWS):
        shares = rng.dirichlet(np.full(clients, partition.alpha), size=len(sizes))
        cuts = np.floor(np.cumsum(shares, axis=1)[:, :-1] * sizes[:, None]).astype(np.int64)
        counts = np.diff(cuts, axis=1, prepend=0, append=sizes[:, None])
        if counts.sum(axis=0).min() >= partition.min_samples:
            break
    else:
        raise ConfigError(
            f"{where} is not met by any of {MAX_DRAWS} draws for {clients} clients with data.partition.alpha: "
            f"{partition.alpha}; lower it, take fewer clients or a larger alpha"
        )
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in range(len(sizes)):
        own = rng.permutation(np.flatnonzero(labels == label))
        for client, part in enumerate(np.split(own, cuts[label])):
            parts[client].append(part)
    return [np.sort(np.concatenate(part)) for part in parts]


def _split_shards(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    """Samples sorted by class, cut into equal shards, k of them to each client (McMahan et al. 2017)."""
    clients, per_client = config.clients, config.partition.classes_per_client
    if clients * per_client > len(train):
        raise ConfigError(
            f"data.partition.classes_per_client: {per_client} for {clients} clients makes {clients * per_client} "
            f"shards of {len(train)} training samples; give at most {len(train) // clients}"
        )
    shuffled = rng.permutation(len(train))
    by_class = shuffled[np.argsort(train.labels.numpy()[shuffled], kind="stable")]
    shards = np.array_split(by_class, clients * per_client)
    deal = rng.permutation(len(shards)).reshape(clients, per_client)
    return [np.sort(np.concatenate([shards[shard] for shard in hand])) for hand in deal]


def _split_natural(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    if train.groups is None:
        raise ConfigError(f"data.partition.name: 'natural', but {config.name!r} knows no natural clients")
    groups = train.groups.numpy()
    names = np.unique(groups)
    if config.clients not in (None, len(names)):
        raise ConfigError(
            f"data.clients: {config.clients}, but {config.name!r} has {len(names)} natural clients; "
            f"give null or {len(names)}"
        )
    return [np.flatnonzero(groups == name) for name in names]


PARTITIONS = {
    schema.IidPartition: _split_iid,
    schema.DirichletPartition: _split_dirichlet,
    schema.ShardsPartition: _split_shards,
    schema.NaturalPartition: _split_natural,
}
