"""The Gaussian mechanism on exact sums: clip, truncate to integers, add, add noise.

A contribution is clipped in float64 to a norm of at most C and truncated towards zero to a fixed-point grid, which can
only shrink it. Integers are then summed exactly, so no rounding and no order of summation adds to the sensitivity C of
the sum; and the noise lies on the same grid.

Shapes: R rows (one contribution each), W columns.
"""

from __future__ import annotations

import math
import os

import torch

from fedpeft_dist.lanes.random import fold_in, random_bits, unit_interval

SHRINK = 1 - 2.0**-20
"""On the clip factor: far more than what float64 can round a norm up by, far less than anyone notices."""
NOISE_RANGE = 10.0
"""Standard deviations that the grid has room for; with 53 random bits no draw gets beyond 8.6."""
_RANGE_BITS, _FLOAT_BITS = 62, 52


def clip_factors(norms: torch.Tensor, clip_norm: float | torch.Tensor) -> torch.Tensor:
    """What to multiply contributions with so that their norms are at most C.

    Args:
        norms: float64 [R]; one that is not finite gets the factor 0 (its row has to be replaced, too: 0 * inf is none).
        clip_norm: C.

    Returns:
        float64 [R], in 0 .. 1.
    """
    factors = (clip_norm * SHRINK / norms).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, 0.0)


def row_norms(rows: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of each row [R, W], computed in float64: [R]."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def grid_bits(largest_sum: float, standard_deviation: float) -> int:
    """s, such that noisy sums fit an int64 as multiples of 2^-s, and the noise, drawn in float64, reaches all of these.

    Args:
        largest_sum: of the contributions, in absolute value.
        standard_deviation: of the noise.
    """
    noise = NOISE_RANGE * standard_deviation
    bits = _RANGE_BITS - math.ceil(math.log2(largest_sum + noise))
    return min(bits, _FLOAT_BITS - math.ceil(math.log2(noise))) if noise else bits


def truncate(rows: torch.Tensor, factors: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows [R, W] times their factors [R], rounded towards zero to multiples of 2^-bits: int64 [R, W].

    No row's norm grows. A row with factor 0 is all zeros, whatever it holds.
    """
    factors = factors.unsqueeze(1)
    scaled = torch.where(factors > 0, rows.double() * factors, 0.0)
    return (scaled * 2.0**bits).trunc_().to(torch.int64)


def noise_on_grid(
    keys: torch.Tensor, columns: int, standard_deviations: torch.Tensor, bits: int, secure: bool
) -> torch.Tensor:
    """Gaussian noise, rounded to multiples of 2^-bits.

    Args:
        keys: int64 [R], one per row; without meaning where secure.
        columns: W.
        standard_deviations: float64 [R].
        secure: draw from the operating system's randomness, in place of what follows from the keys.

    Returns:
        int64 [R, W].
    """
    normal = secure_normal((len(keys), columns), keys.device) if secure else keyed_normal(keys, columns)
    return torch.round(normal * standard_deviations.unsqueeze(1) * 2.0**bits).to(torch.int64)


def keyed_normal(keys: torch.Tensor, columns: int) -> torch.Tensor:
    """Standard normal numbers, a function of the key and the column: float64 [R, W] from int64 keys [R]."""
    counters = torch.arange(columns, device=keys.device)
    places = fold_in(keys.unsqueeze(1), counters)
    return _box_muller(random_bits(fold_in(places, 0)), random_bits(fold_in(places, 1)))


def secure_normal(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normal numbers from the operating system's randomness: float64."""
    return _box_muller(secure_bits(shape, device), secure_bits(shape, device))


def secure_bits(shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 with 64 random bits each, from the operating system."""
    data = bytearray(os.urandom(8 * math.prod(shape)))
    if not data:
        return torch.zeros(shape, dtype=torch.int64, device=device)
    return torch.frombuffer(data, dtype=torch.int64).view(shape).to(device)


def _box_muller(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers from two independent sets of random bits (Box and Muller 1958)."""
    radius = torch.sqrt(-2.0 * torch.log(1.0 - unit_interval(first)))  # of (0, 1], so that the logarithm is finite
    return radius * torch.cos(2.0 * math.pi * unit_interval(second))
