"""Counter-based random numbers: pure functions of a key, without any state.

A key is an int64. `derive_seed` makes a key from names and numbers on the host. `fold_in` derives keys from keys for a
whole tensor at once. A draw depends only on (seed, purpose, round, client, step, sample, site): not on the lane, the
rank, or earlier draws.

Shapes: S ids.
"""

import hashlib

import numpy as np
import torch

# The golden-ratio increment and the two multipliers of splitmix64 (Steele, Lea and Flood 2014), as signed 64-bit ints.
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


def derive_seed(seed: int, purpose: str, *ids: int) -> int:
    """A 63-bit seed for one purpose, from the run's seed and any number of ids (round, client, ...)."""
    text = "/".join([str(seed), purpose, *(str(i) for i in ids)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def random_bits(keys: torch.Tensor) -> torch.Tensor:
    """64 random bits for each int64 key: splitmix64's finalizer, a bijection. An input bit flips about half of them."""
    x = keys + _INCREMENT
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIER_2
    return x ^ _shift_right(x, 31)


def fold_in(keys: torch.Tensor, values: torch.Tensor | int) -> torch.Tensor:
    """New keys from keys and integers, elementwise with broadcasting; int64 in, int64 out."""
    return random_bits(random_bits(keys) ^ values)


def uniform(keys: torch.Tensor) -> torch.Tensor:
    """A float32 in [0, 1) with 24 random bits for each key."""
    return _shift_right(random_bits(keys), 40).to(torch.float32) * 2.0**-24


def uniform_by_id(ids: np.ndarray, seed: int, purpose: str, *more: int) -> np.ndarray:
    """A number in [0, 1) for each id, int64 [S], from the key of a seed, a purpose and more ids: float64 [S]."""
    keys = fold_in(torch.tensor(derive_seed(seed, purpose, *more)), torch.from_numpy(ids))
    return uniform(keys).double().numpy()


def unit_interval(bits: torch.Tensor) -> torch.Tensor:
    """A float64 in [0, 1) with 53 random bits for each int64 of random bits."""
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def permutation(key: int, size: int) -> torch.Tensor:
    """A random order of 0 .. size-1: int64 [size], on the CPU."""
    keys = fold_in(torch.full((size,), key, dtype=torch.int64), torch.arange(size))
    return torch.argsort(keys, stable=True)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift. torch's own shift repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
