"""Which client holds which samples: every kind of partition, and what is held out of them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import beta, kstest

from fedpeft_dist.config import schema
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.data.datasets import ImageSet
from fedpeft_dist.data.partition import (
    SPLITS,
    IndexPartition,
    SharedPoolPartition,
    _cut,
    _top_up,
    class_counts,
    hold_out,
    make_partition,
)


def image_set(labels: np.ndarray, groups: np.ndarray | None = None) -> ImageSet:
    images = torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8)
    return ImageSet(images, torch.from_numpy(labels), None if groups is None else torch.from_numpy(groups))


def balanced(classes: int, per_class: int) -> ImageSet:
    """Classes of equal size in a shuffled order."""
    return image_set(np.random.default_rng(0).permutation(np.repeat(np.arange(classes), per_class)))


def split(
    partition: schema.PartitionConfig, train: ImageSet, clients: int | None, seed: int = 1
) -> IndexPartition | SharedPoolPartition:
    config = schema.SyntheticConfig(name="synthetic", clients=clients, partition=partition)
    return make_partition(config, train, seed)


def lists(partition: IndexPartition) -> list[list[int]]:
    return [partition.indices(client).tolist() for client in range(partition.num_clients)]


def dirichlet(alpha: float, min_samples: int = 0, top_up: bool = False) -> schema.DirichletPartition:
    return schema.DirichletPartition(name="dirichlet", alpha=alpha, min_samples=min_samples, top_up=top_up)


def mix(alpha: float) -> schema.DirichletMixPartition:
    return schema.DirichletMixPartition(name="dirichlet_mix", alpha=alpha)


def quantity(alpha: float, min_samples: int = 1) -> schema.QuantityPartition:
    return schema.QuantityPartition(name="quantity", alpha=alpha, min_samples=min_samples)


IID = schema.IidPartition(name="iid")
NATURAL = schema.NaturalPartition(name="natural")


def shards(classes_per_client: int) -> schema.ShardsPartition:
    return schema.ShardsPartition(name="shards", classes_per_client=classes_per_client)


@pytest.mark.parametrize("clients", [1, 7, 10])
@pytest.mark.parametrize(
    "partition",
    [
        IID,
        dirichlet(0.3, 5),
        dirichlet(10.0),
        dirichlet(0.05, 20, top_up=True),
        mix(0.1),
        mix(100.0),
        quantity(0.5),
        shards(1),
        shards(3),
    ],
    ids=str,
)
def test_every_sample_belongs_to_exactly_one_client(partition: schema.PartitionConfig, clients: int) -> None:
    train = balanced(10, 41)
    made = split(partition, train, clients)
    assert made.num_clients == clients
    assert sorted(chain(*lists(made))) == list(range(410))
    assert [made.size(client) for client in range(clients)] == [len(own) for own in lists(made)]


@pytest.mark.parametrize("partition", [IID, dirichlet(0.3), mix(0.3), quantity(0.5), shards(2)], ids=str)
def test_the_split_is_a_function_of_the_seed(partition: schema.PartitionConfig) -> None:
    train = balanced(10, 40)
    assert lists(split(partition, train, 8, seed=3)) == lists(split(partition, train, 8, seed=3))
    assert lists(split(partition, train, 8, seed=3)) != lists(split(partition, train, 8, seed=4))


def test_every_partition_of_the_schema_can_be_made() -> None:
    choices = set(schema.PartitionConfig.__origin__.__args__)
    assert set(SPLITS) | {schema.PoolPartition} == choices


def test_iid_clients_differ_by_one_sample_at_most_and_mix_all_classes() -> None:
    made = split(IID, balanced(10, 103), 8)
    sizes = [made.size(client) for client in range(8)]
    assert max(sizes) - min(sizes) <= 1
    counts = class_counts(made, balanced(10, 103).labels, 10, 8)
    # Each count is hypergeometric with mean 12.9 and a standard deviation below 3.6.
    assert np.abs(counts - 12.9).max() < 5 * 3.6


@pytest.mark.parametrize(
    "partition",
    [
        IID,
        dirichlet(0.1),
        dirichlet(2.0),
        dirichlet(0.3, 4),
        dirichlet(0.1, 6, top_up=True),
        mix(0.3),
        mix(5.0),
        quantity(0.5, min_samples=0),
        quantity(2.0, min_samples=3),
        shards(2),
    ],
    ids=str,
)
def test_no_client_is_preferred_for_its_number(partition: schema.PartitionConfig) -> None:
    """Over seeds, the first and the last client hold as many samples and classes as the others, and their shares of the
    samples are 1 / N on average, within three standard errors."""
    clients, seeds = 12, 200
    train = image_set(np.repeat(np.arange(9), [5, 40, 8, 31, 17, 2, 23, 29, 30]))
    counts = np.stack(
        [class_counts(split(partition, train, clients, s), train.labels, 9, clients) for s in range(seeds)]
    )
    shares = counts.sum(axis=2) / len(train)
    assert_is_near(shares[:, 0] - 1 / clients)
    assert_is_near(shares[:, -1] - 1 / clients)
    for held in (counts.sum(axis=2), (counts > 0).sum(axis=2)):
        others = held[:, 1:-1].mean(axis=1)
        assert_is_near(held[:, 0] - others)
        assert_is_near(held[:, -1] - others)


def assert_is_near(differences: np.ndarray) -> None:
    """Their mean is 0 within three standard errors."""
    assert abs(differences.mean()) <= 3 * differences.std(ddof=1) / len(differences) ** 0.5


@pytest.mark.parametrize("total", [1, 7, 500])
@pytest.mark.parametrize("shares", [[0.25] * 4, [0.001, 0.499, 0.4985, 0.0015], [0.0, 0.34, 0.66], [1.0]], ids=str)
def test_counts_are_within_one_of_the_share_and_equal_it_on_average(shares: list[float], total: int) -> None:
    draws, expected = 2000, np.array(shares) * total
    cuts = _cut(np.tile(shares, (draws, 1)), total, np.random.default_rng(0))
    counts = np.diff(cuts, axis=1, prepend=0, append=total)
    assert (counts.sum(axis=1) == total).all()
    assert (np.abs(counts - expected) < 1).all()
    errors = np.maximum(np.sqrt(expected % 1 * (1 - expected % 1) / draws), 1e-9)
    assert (np.abs(counts.mean(axis=0) - expected) < 4 * errors).all()


def test_dirichlets_last_client_holds_few_classes_where_alpha_is_small() -> None:
    """CIFAR-100 sizes over 64 clients at alpha 0.1. Such a client once held 98 to 100 of the classes."""
    train = balanced(100, 500)
    for seed in range(3):
        counts = class_counts(split(dirichlet(0.1), train, 64, seed), train.labels, 100, 64)
        held = (counts > 0).sum(axis=1)
        assert 38 - 20 < held[-1] < 38 + 20
        assert held.mean() == pytest.approx(38.6, abs=1.5)


def test_mixed_clients_have_one_size() -> None:
    for alpha, clients in ((0.05, 7), (1.0, 40), (1000.0, 13)):
        sizes = split(mix(alpha), balanced(10, 41), clients).sizes()
        assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("alpha", [0.3, 3.0, 100.0])
def test_a_clients_mix_of_classes_varies_as_the_dirichlets(alpha: float) -> None:
    """A mix has mean p and variance p (1 - p) / (alpha + 1) for a class of prior p; drawing n samples adds its own."""
    prior, size, clients = np.array([0.1, 0.2, 0.3, 0.4]), 100, 4000
    train = image_set(np.repeat(np.arange(4), (prior * size * clients).astype(int)))
    shares = class_counts(split(mix(alpha), train, clients), train.labels, 4, clients) / size
    assert shares.mean(axis=0) == pytest.approx(prior)
    expected = prior * (1 - prior) * ((1 - 1 / size) / (alpha + 1) + 1 / size)
    assert shares.var(axis=0) == pytest.approx(expected, rel=0.1)


def test_mixed_clients_of_a_tiny_alpha_hold_one_class_unless_it_runs_out() -> None:
    train = balanced(10, 500)
    counts = class_counts(split(mix(1e-6), train, 100), train.labels, 10, 100)
    held = (counts > 0).sum(axis=1)
    assert np.median(held) == 1
    # A class that fewer than ten clients want is left over for those whose own class has run out.
    assert held.max() > 1


@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_a_clients_share_of_a_class_follows_the_dirichlets_marginal(alpha: float) -> None:
    """A component of Dir(alpha, ..., alpha) over N clients is Beta(alpha, (N - 1) alpha)."""
    classes, per_class, clients = 300, 800, 6
    train = balanced(classes, per_class)
    counts = class_counts(split(dirichlet(alpha), train, clients), train.labels, classes, clients)
    for own in counts:
        assert kstest(own / per_class, beta(alpha, (clients - 1) * alpha).cdf).pvalue > 1e-3


def test_a_small_alpha_concentrates_and_a_large_one_levels() -> None:
    """The variance of a share is (1/N)(1 - 1/N) / (N alpha + 1)."""
    classes, per_class, clients = 400, 500, 10
    train = balanced(classes, per_class)
    for alpha, tolerance in ((0.05, 0.15), (0.5, 0.15), (50.0, 0.15)):
        counts = class_counts(split(dirichlet(alpha), train, clients), train.labels, classes, clients)
        expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
        assert (counts / per_class).var() == pytest.approx(expected, rel=tolerance)
    concentrated = class_counts(split(dirichlet(0.01), train, clients), train.labels, classes, clients)
    assert (concentrated.max(axis=0) / per_class).mean() > 0.9


@pytest.mark.parametrize("seed", range(5))
def test_dirichlet_is_redrawn_until_every_client_has_enough(seed: int) -> None:
    train = balanced(10, 50)
    free = split(dirichlet(0.1), train, 10, seed)
    bound = split(dirichlet(0.1, min_samples=10), train, 10, seed)
    assert min(bound.size(client) for client in range(10)) >= 10
    if min(free.size(client) for client in range(10)) >= 10:
        assert lists(free) == lists(bound)


@pytest.mark.parametrize("seed", range(5))
def test_topping_up_moves_the_fewest_samples_from_the_largest_clients(seed: int) -> None:
    """64 clients of 1,000 samples: no draw at alpha 0.1 leaves none without (PAPER's data-scale experiment)."""
    train = balanced(10, 100)
    free = split(dirichlet(0.02), train, 64, seed)
    topped = split(dirichlet(0.02, 1, top_up=True), train, 64, seed)
    before = np.array([free.size(client) for client in range(64)])
    after = np.array([topped.size(client) for client in range(64)])
    empty = before == 0
    assert empty.any()
    assert (after[empty] == 1).all()
    assert after.sum() == before.sum()
    assert (before - after)[~empty].sum() == empty.sum()
    untouched = [c for c in range(64) if before[c] and before[c] == after[c]]
    assert all(free.indices(c).tolist() == topped.indices(c).tolist() for c in untouched)
    given = np.flatnonzero((before > after) & ~empty)
    assert before[given].min() >= before[untouched].max()


def test_topping_up_takes_from_equal_clients_by_chance() -> None:
    givers = set()
    for seed in range(20):
        lists = [np.arange(3), np.arange(3, 6), np.arange(0), np.arange(6, 9)]
        _top_up(lists, 1, np.random.default_rng(seed))
        givers |= {client for client in (0, 1, 3) if len(lists[client]) == 2}
    assert givers == {0, 1, 3}


def test_quantity_skew_has_uneven_sizes_and_even_classes() -> None:
    train = balanced(4, 5000)
    made = split(quantity(0.5), train, 20)
    sizes = np.array([made.size(client) for client in range(20)])
    assert sizes.min() >= 1
    assert sizes.max() > 4 * np.median(sizes)
    counts = class_counts(made, train.labels, 4, 20)
    large = counts[sizes >= 400]
    assert (np.abs(large / large.sum(axis=1, keepdims=True) - 0.25) < 0.1).all()


@pytest.mark.parametrize("seed", range(3))
def test_quantity_sizes_follow_the_dirichlets_marginal(seed: int) -> None:
    clients, alpha = 400, 0.7
    made = split(quantity(alpha, min_samples=0), balanced(2, 50_000), clients, seed)
    shares = np.array([made.size(client) for client in range(clients)]) / 100_000
    assert kstest(shares, beta(alpha, alpha * (clients - 1)).cdf).pvalue > 1e-3


def test_a_class_is_dealt_out_in_random_order() -> None:
    """A client's samples of a class come from the whole of the data set, not from one stretch of it."""
    made = split(dirichlet(100.0), image_set(np.zeros(3000, dtype=np.int64)), 3)
    for client in range(3):
        own = made.indices(client).double()
        assert abs(own.mean() - 1499.5) < 5 * 3000 / np.sqrt(12 * len(own))


def test_dirichlet_knows_classes_without_samples_and_uneven_ones() -> None:
    labels = np.array([0] * 3 + [2] * 200 + [5] * 17)
    made = split(dirichlet(0.5, 3), image_set(labels), 4)
    assert sorted(chain(*lists(made))) == list(range(len(labels)))
    assert min(made.size(client) for client in range(4)) >= 3


def test_shards_that_divide_the_classes_give_a_client_k_classes_at_most() -> None:
    train = balanced(10, 60)
    for k in (1, 2, 3):
        made = split(shards(k), train, 10)  # 10 k shards of 60 / k samples, each within one class
        counts = class_counts(made, train.labels, 10, 10)
        assert (counts > 0).sum(axis=1).max() <= k
        assert {made.size(client) for client in range(10)} == {60}


def test_shards_over_a_class_boundary_hold_two_classes_at_most() -> None:
    train = balanced(10, 61)
    made = split(shards(2), train, 13)
    counts = class_counts(made, train.labels, 10, 13)
    assert (counts > 0).sum(axis=1).max() <= 4
    # 26 shards cut 10 classes: 9 boundaries fall inside shards at most.
    assert (counts > 0).sum() <= 26 + 9
    sizes = [made.size(client) for client in range(13)]
    assert max(sizes) - min(sizes) <= 2


def test_natural_clients_are_the_groups() -> None:
    groups = np.array([5, 2, 5, 9, 2, 2, 9])
    for clients in (None, 3):
        made = split(NATURAL, image_set(np.zeros(7, dtype=np.int64), groups), clients)
        assert lists(made) == [[1, 4, 5], [0, 2], [3, 6]]


def test_a_million_pool_clients_cost_nothing() -> None:
    train, peaks = balanced(2, 50), []
    for _ in range(3):  # other threads of this process may allocate meanwhile, but hardly each time
        tracemalloc.start()
        try:
            made = split(schema.PoolPartition(name="pool", samples=30), train, 1_000_000)
            last = made.indices(999_999)
            total = made.largest_total(1000)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert min(peaks) < 2**17
    assert isinstance(made, SharedPoolPartition)
    assert last.tolist() == [(999_999 * 30 + j) % 100 for j in range(30)]
    assert total == 30_000
    windows = [made.indices(client).tolist() for client in range(10)]
    assert list(chain(*windows)) == list(range(100)) * 3  # one after another around the pool
    assert made.size(123_456) == 30


def test_largest_total_is_the_sum_of_the_largest_sizes() -> None:
    made = IndexPartition.from_lists([np.arange(size) for size in (3, 0, 8, 5, 5)])
    assert [made.largest_total(m) for m in (1, 2, 3, 5)] == [8, 13, 18, 21]


@pytest.mark.parametrize("share", [0.05, 0.25, 0.9])
def test_held_out_samples_are_a_share_of_each_clients_own(share: float) -> None:
    made = IndexPartition.from_lists(np.split(np.random.default_rng(0).permutation(160), [1, 3, 13, 60]))
    kept, held = hold_out(made, share, seed=1)
    for client, own in enumerate(lists(made)):
        left, out = kept.indices(client).tolist(), held.indices(client).tolist()
        assert sorted(left + out) == sorted(own)
        assert len(left) >= 1
        assert len(out) == min(round(share * len(own)), len(own) - 1)
    again = hold_out(made, share, seed=1)
    assert (lists(kept), lists(held)) == (lists(again[0]), lists(again[1]))
    assert lists(hold_out(made, share, seed=2)[1]) != lists(held)


def test_holding_out_knows_clients_without_samples() -> None:
    kept, held = hold_out(IndexPartition.from_lists([np.arange(0), np.arange(4)]), 0.5, seed=1)
    assert (kept.size(0), held.size(0)) == (0, 0)
    assert (kept.size(1), held.size(1)) == (2, 2)


def test_held_out_samples_are_drawn_from_all_places() -> None:
    made = IndexPartition.from_lists([np.arange(100)] * 400)
    _, held = hold_out(made, 0.2, seed=1)
    counts = np.bincount(held.samples.numpy(), minlength=100)
    assert counts.sum() == 400 * 20
    assert np.abs(counts - 80).max() < 5 * np.sqrt(400 * 0.2 * 0.8)


def test_class_counts_stop_at_the_clients_asked_for() -> None:
    made = IndexPartition.from_lists([np.array([0, 1]), np.array([2]), np.array([3, 4])])
    labels = torch.tensor([1, 1, 0, 2, 1])
    assert class_counts(made, labels, 4, 2).tolist() == [[0, 2, 0, 0], [1, 0, 0, 0]]
    assert class_counts(made, labels, 4, 9).shape == (3, 4)


@pytest.mark.parametrize(
    ("partition", "clients", "message"),
    [
        (IID, 41, r"data\.clients: 41 .* 40 training samples"),
        (dirichlet(0.1, 5), 9, r"data\.partition\.min_samples: 5 for 9 clients .* 40 training samples"),
        (dirichlet(1e-3, 4), 10, r"min_samples: 4 is not met by any of 1000 draws .*alpha: 0\.001"),
        (dirichlet(0.1, 5, top_up=True), 9, r"data\.partition\.min_samples: 5 for 9 clients .* 40 training samples"),
        (quantity(0.1, 5), 9, r"data\.partition\.min_samples: 5 for 9 clients .* 40 training samples"),
        (quantity(1e-3, 4), 10, r"min_samples: 4 is not met by any of 1000 draws .*alpha: 0\.001"),
        (shards(4), 11, r"classes_per_client: 4 for 11 clients .* at most 3"),
        (shards(5), 2, r"classes_per_client: 5 is more than the 4 classes"),
        (NATURAL, 4, r"'natural', but 'synthetic' knows no natural clients"),
    ],
    ids=[
        "clients",
        "min_samples",
        "draws",
        "top_up",
        "quantity",
        "quantity draws",
        "shards",
        "shard classes",
        "natural",
    ],
)
def test_a_partition_that_cannot_be_is_refused(partition: schema.PartitionConfig, clients: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(partition, balanced(4, 10), clients)


@pytest.mark.parametrize("make", [dirichlet, mix, quantity])
@pytest.mark.parametrize("alpha", [1e308, 1e-12, float("inf"), 0.0, -1.0])
def test_an_alpha_that_nothing_can_be_drawn_from_is_refused(make: Callable[[float], Any], alpha: float) -> None:
    with pytest.raises(ValidationError, match="alpha"):
        make(alpha)


@pytest.mark.parametrize("make", [dirichlet, mix, lambda alpha: quantity(alpha, min_samples=0)])
@pytest.mark.parametrize("alpha", [1e-9, 1e9])
def test_the_smallest_and_the_largest_alpha_deal_everything_out(make: Callable[[float], Any], alpha: float) -> None:
    made = split(make(alpha), balanced(10, 41), 7)
    assert sorted(chain(*lists(made))) == list(range(410))
    assert (made.sizes().max() < 70) == (alpha == 1e9 or isinstance(make(alpha), schema.DirichletMixPartition))


def test_a_wrong_number_of_natural_clients_is_refused() -> None:
    train = image_set(np.zeros(4, dtype=np.int64), np.array([0, 1, 1, 2]))
    with pytest.raises(ConfigError, match=r"data\.clients: 2, but 'synthetic' has 3 natural clients; give null or 3"):
        split(NATURAL, train, 2)
