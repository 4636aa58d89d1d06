"""The ways to deal training samples out to clients. SPLITS maps a partition's config class to one of them.

Each is a function of (config, training set, numpy generator) to one int64 array of sample indices per client.

Shapes: N clients, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedpeft_dist.config import schema
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data.datasets import ImageSet

MAX_DRAWS = 1000


def _split_iid(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    return [np.sort(part) for part in np.array_split(rng.permutation(len(train)), config.clients)]


def _split_dirichlet(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    """Each class is dealt out by its own draw from Dir(alpha, ..., alpha) (Hsu et al. 2019, arXiv 1909.06335)."""
    partition, clients = config.partition, config.clients
    labels = train.labels.numpy()
    sizes = np.bincount(labels)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        """Where each class is cut, [K, N - 1], and how many samples each client gets, [N]."""
        shares = rng.dirichlet(np.full(clients, partition.alpha), size=len(sizes))
        cuts = np.floor(np.cumsum(shares, axis=1)[:, :-1] * sizes[:, None]).astype(np.int64)
        return cuts, np.diff(cuts, axis=1, prepend=0, append=sizes[:, None]).sum(axis=0)

    cuts = _draw_until_enough(draw, config, len(train), redraw=not partition.top_up)
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in range(len(sizes)):
        own = rng.permutation(np.flatnonzero(labels == label))
        for client, part in enumerate(np.split(own, cuts[label])):
            parts[client].append(part)
    lists = [np.concatenate(part) for part in parts]
    if partition.top_up:
        _top_up(lists, partition.min_samples, rng)
    return [np.sort(part) for part in lists]


def _split_quantity(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    """Sizes are one draw from Dir(alpha, ..., alpha), the samples of each client a random set (Li et al. 2022,
    arXiv 2102.02079, quantity skew)."""

    def draw() -> tuple[np.ndarray, np.ndarray]:
        shares = rng.dirichlet(np.full(config.clients, config.partition.alpha))
        cuts = np.floor(np.cumsum(shares)[:-1] * len(train)).astype(np.int64)
        return cuts, np.diff(cuts, prepend=0, append=len(train))

    cuts = _draw_until_enough(draw, config, len(train))
    return [np.sort(part) for part in np.split(rng.permutation(len(train)), cuts)]


def _draw_until_enough(
    draw: Callable[[], tuple[np.ndarray, np.ndarray]], config: schema.DataConfig, num_train: int, redraw: bool = True
) -> np.ndarray:
    """The first draw (cuts, sizes [N]) whose sizes all reach `min_samples`: its cuts; just the first without `redraw`.

    Raises:
        ConfigError: no draw can reach it, or none of MAX_DRAWS has.
    """
    partition, clients = config.partition, config.clients
    where = f"data.partition.min_samples: {partition.min_samples}"
    if partition.min_samples * clients > num_train:
        raise ConfigError(f"{where} for {clients} clients needs more than the {num_train} training samples")
    for _ in range(MAX_DRAWS):
        cuts, sizes = draw()
        if not redraw or sizes.min() >= partition.min_samples:
            return cuts
    raise ConfigError(
        f"{where} is not met by any of {MAX_DRAWS} draws for {clients} clients with data.partition.alpha: "
        f"{partition.alpha}; lower it, take fewer clients or a larger alpha"
        + (", or set data.partition.top_up: true" if isinstance(partition, schema.DirichletPartition) else "")
    )


def _top_up(lists: list[np.ndarray], min_samples: int, rng: np.random.Generator) -> None:
    """Gives every client below `min_samples` samples of the client that is the largest at that moment, one by one."""
    sizes = np.array([len(part) for part in lists])
    for client in np.flatnonzero(sizes < min_samples):
        while sizes[client] < min_samples:
            largest = int(sizes.argmax())
            given = int(rng.integers(sizes[largest]))
            lists[client] = np.append(lists[client], lists[largest][given])
            lists[largest] = np.delete(lists[largest], given)
            sizes[client] += 1
            sizes[largest] -= 1


def _split_shards(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    """Samples sorted by class, cut into equal shards, k of them to each client (McMahan et al. 2017)."""
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
    return [np.sort(np.concatenate([shards[shard] for shard in hand])) for hand in deal]


def _split_natural(config: schema.DataConfig, train: ImageSet, rng: np.random.Generator) -> list[np.ndarray]:
    if train.groups is None:
        # A data set that may know them has a key for it.
        lacks = "data.client_column: null names no column that says whose a sample is; give one"
        if not hasattr(config, "client_column"):
            lacks = f"{config.name!r} knows no natural clients; glyphs, glyphs100 and huggingface do"
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
    schema.QuantityPartition: _split_quantity,
    schema.ShardsPartition: _split_shards,
    schema.NaturalPartition: _split_natural,
}
