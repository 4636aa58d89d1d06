"""Partitions: which client holds which training samples, and the ways to deal samples out to clients.

SPLITS maps a partition's config class to its function. A function takes (config, training set, numpy generator) and
returns one int64 array of sample indices per client, in any order. No function prefers a client for its number: the
samples that rounding leaves over are dealt out by chance.

Shapes: N clients, S training samples, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch

from fedpeft_dist.config import schema
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.lanes.random import derive_seed, permutation

MAX_DRAWS = 1000


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


def _split_iid(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    order = rng.permutation(len(train))
    return np.split(order, _even_cuts(config, train, rng))


def _split_dirichlet(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    """Each class has its own draw of shares from Dir(alpha, ..., alpha) over the clients (Yurochkin et al. 2019, arXiv
    1905.12022)."""
    labels = train.labels.numpy()
    lists = _deal_classes(labels, _draw_cuts(config, np.bincount(labels), rng), rng)
    if config.partition.top_up:
        _top_up(lists, config.partition.min_samples, rng)
    return lists


def _split_dirichlet_mix(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    """Clients of equal size, each with a mix of classes drawn from Dir(alpha * p), where p are the classes' shares of
    the training samples (Hsu et al. 2019, arXiv 1909.06335).

    Every sample has one client. Each client draws the classes of its samples from its mix, all clients at once. If a
    class is drawn more often than it has samples, random draws of it are taken back. The client draws them again from
    its mix without the exhausted classes, renormalised. A client whose classes are all exhausted draws in proportion to
    the samples that are left.
    """
    labels = train.labels.numpy()
    left = np.bincount(labels)
    present = np.flatnonzero(left)
    left = left[present]
    mixes = rng.dirichlet(config.partition.alpha * left / len(train), size=config.clients)
    lacking = np.diff(_even_cuts(config, train, rng), prepend=0, append=len(train))
    counts = np.zeros(mixes.shape, dtype=np.int64)
    while lacking.any():
        chances = mixes * (left > 0)
        chances[chances.sum(axis=1) == 0] = left
        drawn = rng.multinomial(lacking, chances / chances.sum(axis=1, keepdims=True))
        for label in np.flatnonzero(drawn.sum(axis=0) > left):
            drawn[:, label] = rng.multivariate_hypergeometric(drawn[:, label], left[label])
        counts += drawn
        left -= drawn.sum(axis=0)
        lacking -= drawn.sum(axis=1)
    cuts = np.zeros((present[-1] + 1, config.clients - 1), dtype=np.int64)
    cuts[present] = np.cumsum(counts.T, axis=1)[:, :-1]
    return _deal_classes(labels, cuts, rng)


def _split_quantity(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    """The sizes are one draw from Dir(alpha, ..., alpha). Each client's samples are a random set (Li et al. 2022, arXiv
    2102.02079, quantity skew)."""
    [cuts] = _draw_cuts(config, np.array([len(train)]), rng)
    return np.split(rng.permutation(len(train)), cuts)


def _cut(shares: np.ndarray, total: int | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The places where a row of samples is cut to give each client its share of the total: int64 [..., N - 1].

    Rounding starts at a random place of every row (systematic sampling). A client's count therefore differs from its
    share times the total by less than one, equals it on average, and does not depend on the client's number.

    Args:
        shares: [..., N]; each row adds up to 1.
        total: the samples of each row, [..., 1].
    """
    ends = np.cumsum(shares, axis=-1)[..., :-1] * total + rng.random((*shares.shape[:-1], 1))
    return np.minimum(np.floor(ends).astype(np.int64), total)


def _even_cuts(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> np.ndarray:
    return _cut(np.full(config.clients, 1 / config.clients), len(train), rng)


def _deal_classes(labels: np.ndarray, cuts: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The samples of every client: each class in random order, cut at its row of `cuts` [K, N - 1]."""
    parts = [np.split(rng.permutation(np.flatnonzero(labels == label)), own) for label, own in enumerate(cuts)]
    return [np.concatenate(own) for own in zip(*parts)]


def _draw_cuts(config: schema.DataConfig, totals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The cuts [K, N - 1] of rows of `totals` [K] samples, whose shares are drawn from Dir(alpha, ..., alpha).

    All rows are drawn again until every client has `min_samples`, unless the clients will be topped up.
    """
    partition, clients = config.partition, config.clients
    where = f"data.partition.min_samples: {partition.min_samples}"
    if partition.min_samples * clients > totals.sum():
        raise ConfigError(f"{where} for {clients} clients needs more than the {totals.sum()} training samples")
    for _ in range(MAX_DRAWS):
        shares = rng.dirichlet(np.full(clients, partition.alpha), size=len(totals))
        cuts = _cut(shares, totals[:, None], rng)
        sizes = np.diff(cuts, axis=1, prepend=0, append=totals[:, None]).sum(axis=0)
        if getattr(partition, "top_up", False) or sizes.min() >= partition.min_samples:
            return cuts
    raise ConfigError(
        f"{where} is not met by any of {MAX_DRAWS} draws for {clients} clients with data.partition.alpha: "
        f"{partition.alpha}; lower it, take fewer clients or a larger alpha"
        + (", or set data.partition.top_up: true" if hasattr(partition, "top_up") else "")
    )


def _top_up(lists: list[np.ndarray], min_samples: int, rng: np.random.Generator) -> None:
    """Moves samples one by one from the largest client of the moment to each client below `min_samples`.

    The clients come in random order, and chance decides between equally large clients.
    """
    sizes = np.array([len(part) for part in lists])
    for client in rng.permutation(np.flatnonzero(sizes < min_samples)):
        while sizes[client] < min_samples:
            largest = int(rng.choice(np.flatnonzero(sizes == sizes.max())))
            given = int(rng.integers(sizes[largest]))
            lists[client] = np.append(lists[client], lists[largest][given])
            lists[largest] = np.delete(lists[largest], given)
            sizes[client] += 1
            sizes[largest] -= 1


def _split_shards(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    """Samples sorted by class and cut into equal shards; each client gets a few shards (McMahan et al. 2017)."""
    clients, per_client = config.clients, config.partition.classes_per_client
    num_classes = len(np.unique(train.labels.numpy()))
    if per_client > num_classes:
        raise ConfigError(
            f"data.partition.classes_per_client: {per_client} is more than the {num_classes} classes; give at most that"
        )
    if clients * per_client > len(train):
        raise ConfigError(
            f"data.partition.classes_per_client: {per_client} for {clients} clients makes {clients * per_client} "
            f"shards of {len(train)} training samples; give at most {len(train) // clients}"
        )
    shuffled = rng.permutation(len(train))
    by_class = shuffled[np.argsort(train.labels.numpy()[shuffled], kind="stable")]
    shards = np.array_split(by_class, clients * per_client)
    deal = rng.permutation(len(shards)).reshape(clients, per_client)
    return [np.concatenate([shards[shard] for shard in hand]) for hand in deal]


def _split_natural(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    if train.groups is None:
        lacks = "data.client_column: null names no column that says whose a sample is; give one"
        if not config.natural_clients:
            sections = [section for section in schema.DataSection.__subclasses__() if section.natural_clients]
            names = [get_args(section.model_fields["name"].annotation)[0] for section in sections]
            lacks = f"{config.name!r} knows no natural clients; data sets that do: {', '.join(names)}"
        raise ConfigError(f"data.partition.name: 'natural', but {lacks}")
    groups = train.groups.numpy()
    names = np.unique(groups)
    if config.clients not in (None, len(names)):
        raise ConfigError(
            f"data.clients: {config.clients}, but {config.name!r} has {len(names)} natural clients; "
            f"give null or {len(names)}"
        )
    return [np.flatnonzero(groups == name) for name in names]


SPLITS = {
    schema.IidPartition: _split_iid,
    schema.DirichletPartition: _split_dirichlet,
    schema.DirichletMixPartition: _split_dirichlet_mix,
    schema.QuantityPartition: _split_quantity,
    schema.ShardsPartition: _split_shards,
    schema.NaturalPartition: _split_natural,
}
