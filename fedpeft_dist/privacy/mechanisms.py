"""The Gaussian mechanism on exact sums: clip, truncate to integers, add, add noise.

A contribution is clipped in float64 to a norm of at most C. Then it is truncated towards zero to a fixed-point grid,
which can only shrink it. The sum of integers is exact, so neither rounding nor the order of summation adds to the sum's
sensitivity C. The noise lies on the same grid.

Shapes: R rows (one contribution each), W columns.
"""

import math
import os
from collections.abc import Iterator

import numpy as np
import torch

from fedpeft_dist.lanes.parameters import ALIGNMENT
from fedpeft_dist.lanes.random import fold_in, random_bits, unit_interval

_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
"""Elements of one block. Blocks limit the memory of float64 and int64 copies, and fit into the CPU's caches."""
SHRINK = 1 - 2.0**-20
"""Margin of the clip factor: far larger than float64's rounding of a norm, and far too small to matter."""
NOISE_RANGE = 10.0
"""Standard deviations of noise that the grid has room for. With 53 random bits no draw exceeds 8.6."""
_RANGE_BITS, _FLOAT_BITS = 62, 52


def clip_factors(norms: torch.Tensor, clip_norm: float | torch.Tensor) -> torch.Tensor:
    """The factors that scale contributions to norms of at most C.

    Args:
        norms: float64 [R]. A norm that is not finite gets the factor 0. The caller must also replace its row, because
            0 * inf is NaN.
        clip_norm: C.

    Returns:
        float64 [R], in 0 .. 1.
    """
    factors = (clip_norm * SHRINK / norms).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, 0.0)


def row_norms(rows: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of each row [R, W], computed in float64: [R]."""
    squares = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for columns in column_blocks(rows):
        squares += rows[:, columns].double().square().sum(dim=1)
    return squares.sqrt_()


def column_blocks(rows: torch.Tensor) -> Iterator[slice]:
    """The columns of rows [R, W] in blocks. All blocks but the last one end at multiples of ALIGNMENT."""
    most = _BLOCK_ELEMENTS.get(rows.device.type, _BLOCK_ELEMENTS["cuda"]) // max(len(rows), 1)
    step = max(ALIGNMENT, most // ALIGNMENT * ALIGNMENT)
    return (slice(start, min(start + step, rows.shape[1])) for start in range(0, rows.shape[1], step))


def grid_bits(largest_sum: float, standard_deviation: float) -> int:
    """The number s of the grid's fractional bits: the grid holds the multiples of 2^-s.

    Noisy sums fit an int64, and noise drawn in float64 reaches every multiple.

    Args:
        largest_sum: largest absolute value of the sum of contributions.
        standard_deviation: standard deviation of the noise.
    """
    noise = NOISE_RANGE * standard_deviation
    bits = _RANGE_BITS - math.ceil(math.log2(largest_sum + noise))
    return min(bits, _FLOAT_BITS - math.ceil(math.log2(noise))) if noise else bits


def truncate(rows: torch.Tensor, factors: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows [R, W] times their factors [R], rounded towards zero to multiples of 2^-bits: int64 [R, W].

    No row's norm grows. A row with factor 0 becomes zeros, even if it is not finite.
    """
    factors = factors.unsqueeze(1)
    scaled = torch.where(factors > 0, rows.double() * factors, 0.0)
    return (scaled * 2.0**bits).trunc_().to(torch.int64)


def noise_on_grid(
    keys: torch.Tensor, columns: int, standard_deviations: torch.Tensor, bits: int, secure: bool
) -> torch.Tensor:
    """Gaussian noise, rounded to multiples of 2^-bits.

    Args:
        keys: int64 [R], one per row; ignored if secure.
        columns: W.
        standard_deviations: float64 [R].
        secure: draw from the operating system's randomness instead of the keys.

    Returns:
        int64 [R, W].
    """
    noise = torch.empty(len(keys), columns, dtype=torch.int64, device=keys.device)
    scales = (standard_deviations * 2.0**bits).unsqueeze(1)
    for block in column_blocks(noise):
        noise[:, block] = (_normal(keys, block, secure) * scales).round_().to(torch.int64)
    return noise


def keyed_normal(keys: torch.Tensor, columns: int) -> torch.Tensor:
    """Standard normal numbers as a function of the key and the column: float64 [R, W] from int64 keys [R]."""
    normal = torch.empty(len(keys), columns, dtype=torch.float64, device=keys.device)
    for block in column_blocks(normal):
        normal[:, block] = _normal(keys, block, secure=False)
    return normal


def _normal(keys: torch.Tensor, columns: slice, secure: bool) -> torch.Tensor:
    """Standard normal numbers for some columns, by Box and Muller (1958), from the keys or the operating system."""
    if secure:
        shape = (len(keys), columns.stop - columns.start)
        first, second = (secure_bits(shape, keys.device) for _ in range(2))
    else:
        places = fold_in(keys.unsqueeze(1), torch.arange(columns.start, columns.stop, device=keys.device))
        first, second = (random_bits(fold_in(places, number)) for number in range(2))
    positive = 1.0 - unit_interval(first)  # in (0, 1], so the logarithm is finite
    return torch.sqrt(-2.0 * torch.log(positive)) * torch.cos(2.0 * math.pi * unit_interval(second))


def secure_bits(shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
    """Random int64 numbers from the operating system, 64 bits each."""
    data = np.frombuffer(os.urandom(8 * math.prod(shape)), dtype=np.int64)
    return torch.tensor(data, device=device).view(shape)
