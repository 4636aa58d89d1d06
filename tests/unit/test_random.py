"""Counter-based random numbers: the hash, its statistics, and the orders drawn from it."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from fedpeft_dist.lanes.random import derive_seed, fold_in, permutation, random_bits, uniform

INCREMENT = 0x9E3779B97F4A7C15
WORD = (1 << 64) - 1


def signed(value: int) -> int:
    """A 64-bit word as a signed number, as in torch's int64."""
    value &= WORD
    return value - (1 << 64) if value >> 63 else value


def reference_mix(key: int) -> int:
    """splitmix64's finalizer on Python's unbounded integers."""
    x = (key + INCREMENT) & WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return signed(x ^ (x >> 31))


def keys_of(*values: int) -> torch.Tensor:
    return torch.tensor([signed(value) for value in values], dtype=torch.int64)


def bits_of(words: torch.Tensor) -> np.ndarray:
    """The bits of int64 words [n]: [n, 64] of 0 and 1."""
    return np.unpackbits(words.numpy().view(np.uint8).reshape(-1, 8), axis=1)


def test_mix_equals_the_published_numbers_of_splitmix64() -> None:
    """The first outputs of the reference generator (Vigna's splitmix64.c) seeded with 1234567."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    counters = keys_of(*(1234567 + i * INCREMENT for i in range(5)))
    assert random_bits(counters).tolist() == [signed(value) for value in published]


def test_mix_equals_the_reference_on_python_ints() -> None:
    random_keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, size=500, dtype=np.int64).tolist()
    extremes = [0, 1, -1, 2**63 - 1, -(2**63), INCREMENT, -INCREMENT]
    keys = random_keys + extremes
    assert random_bits(keys_of(*keys)).tolist() == [reference_mix(key) for key in keys]


def test_fold_in_is_two_mixes_broadcast_over_keys_and_values() -> None:
    keys = keys_of(3, -5, 2**62)
    values = torch.arange(4)
    folded = fold_in(keys.unsqueeze(1), values)
    expected = [[reference_mix(reference_mix(k) ^ v) for v in values.tolist()] for k in keys.tolist()]
    assert folded.tolist() == expected
    assert fold_in(keys, 7).tolist() == [reference_mix(reference_mix(k) ^ 7) for k in keys.tolist()]


def test_a_draw_does_not_depend_on_its_place_in_the_batch() -> None:
    keys = fold_in(torch.tensor(11), torch.arange(101))
    draws = uniform(keys)
    alone = torch.stack([uniform(key) for key in keys])
    assert torch.equal(draws, alone)


def test_uniform_takes_the_upper_24_bits() -> None:
    keys = fold_in(torch.tensor(5), torch.arange(300))
    expected = [((reference_mix(key) & WORD) >> 40) / 2**24 for key in keys.tolist()]
    draws = uniform(keys)
    assert draws.dtype == torch.float32
    assert draws.tolist() == expected


@pytest.mark.parametrize("seed", [0, 1, derive_seed(1, "step", 3, 7)])
def test_draws_of_consecutive_counters_look_uniform_and_independent(seed: int) -> None:
    """Moments, serial correlation and a histogram, within 5 standard errors of those of U(0, 1)."""
    n = 200_000
    draws = uniform(fold_in(torch.tensor(seed), torch.arange(n))).double()
    assert abs(draws.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(draws.var() - 1 / 12) < 5 * math.sqrt((1 / 80 - 1 / 144) / n)
    centred = draws - draws.mean()
    for lag in (1, 2, 64, 1000):
        correlation = (centred[lag:] * centred[:-lag]).mean() / draws.var()
        assert abs(correlation) < 5 / math.sqrt(n), lag
    observed = torch.histc(draws.float(), 256, 0, 1).numpy()
    statistic = ((observed - n / 256) ** 2 / (n / 256)).sum()
    assert 1e-5 < chi2.sf(statistic, 255) < 1 - 1e-5


def test_draws_of_neighbouring_keys_and_sites_are_uncorrelated() -> None:
    n = 100_000
    counter = torch.arange(n)
    streams = [uniform(fold_in(torch.tensor(key), counter)) for key in (1, 2, 3, 1 << 40)]
    streams += [uniform(fold_in(fold_in(torch.tensor(1), counter), site)) for site in range(3)]
    correlations = np.corrcoef(torch.stack(streams).numpy())
    off_diagonal = correlations[~np.eye(len(streams), dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 / math.sqrt(n)


def test_every_output_bit_is_balanced_and_every_input_bit_flips_half_of_them() -> None:
    n = 4096
    keys = fold_in(torch.tensor(9), torch.arange(n))
    out = random_bits(keys)
    assert np.abs(bits_of(out).mean(axis=0) - 0.5).max() < 5 * 0.5 / math.sqrt(n)
    for bit in range(64):
        flipped = bits_of(out ^ random_bits(keys ^ signed(1 << bit)))
        assert abs(flipped.sum(axis=1).mean() - 32) < 5 * 4 / math.sqrt(n), bit
        assert np.abs(flipped.mean(axis=0) - 0.5).max() < 6 * 0.5 / math.sqrt(n), bit


def test_derived_seeds_differ_for_every_purpose_and_id() -> None:
    purposes = ("data", "backbone", "method", "partition", "validation", "cohort", "step", "order", "tick")
    seeds = [derive_seed(s, p, *ids) for s in range(3) for p in purposes for ids in product(range(12), repeat=2)]
    seeds += [derive_seed(s, p, i) for s in range(3) for p in purposes for i in range(120)]
    seeds += [derive_seed(s, p) for s in range(3) for p in purposes]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "order", 2, 3) == derive_seed(1, "order", 2, 3)
    assert derive_seed(1, "order", 2, 3) != derive_seed(1, "order", 3, 2)
    assert derive_seed(1, "order", 1, 23) != derive_seed(1, "order", 12, 3)
    assert torch.tensor(max(seeds), dtype=torch.int64).item() == max(seeds)


@pytest.mark.parametrize("size", [0, 1, 2, 17, 1000])
def test_permutation_is_a_permutation_and_repeats(size: int) -> None:
    order = permutation(42, size)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(size))
    assert torch.equal(order, permutation(42, size))


def test_permutations_of_different_keys_differ() -> None:
    assert len({tuple(permutation(key, 50).tolist()) for key in range(200)}) == 200


def test_every_order_is_equally_likely() -> None:
    """Chi-square over all 24 orders of 4 elements, and over the position of each of 16 elements."""
    trials = 6000
    counts = dict.fromkeys(permutations(range(4)), 0)
    for trial in range(trials):
        counts[tuple(permutation(derive_seed(1, "order", trial), 4).tolist())] += 1
    expected = trials / 24
    assert 1e-4 < chi2.sf(sum((n - expected) ** 2 / expected for n in counts.values()), 23) < 1 - 1e-4

    positions = np.zeros((16, 16))
    for trial in range(trials):
        positions[np.arange(16), permutation(derive_seed(2, "order", trial), 16).numpy()] += 1
    expected = trials / 16
    # Rows and columns both sum to the number of trials: 15 x 15 degrees of freedom, after rescaling.
    statistic = ((positions - expected) ** 2 / expected).sum() * 15 / 16
    assert 1e-4 < chi2.sf(statistic, 15 * 15) < 1 - 1e-4
