"""Clipping, exact sums and noise, against integers of any size and against statistics."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from fedpeft_dist.lanes.random import fold_in
from fedpeft_dist.privacy import mechanisms
from fedpeft_dist.privacy.mechanisms import (
    NOISE_RANGE,
    clip_factors,
    grid_bits,
    keyed_normal,
    noise_on_grid,
    row_norms,
    secure_bits,
    truncate,
)
from fedpeft_dist.training.gradients import clipped_sums

CLIP_NORMS = [1.0, 0.1, 1e-6, 3.7e4]
numbers = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, 1e-45, 3.4e38, -3.4e38, math.inf, math.nan])
rows_of_five = st.lists(st.lists(numbers, min_size=5, max_size=5), min_size=1, max_size=12)


def exact_norm(row: torch.Tensor, bits: int) -> Fraction:
    """The square of the norm of integers that count multiples of 2^-bits."""
    return sum(Fraction(value) ** 2 for value in row.tolist()) / Fraction(2) ** (2 * bits)


def clipped(rows: torch.Tensor, clip_norm: float, bits: int) -> torch.Tensor:
    return truncate(rows, clip_factors(row_norms(rows), clip_norm), bits)


@settings(max_examples=150, deadline=None)
@given(rows=rows_of_five, clip_norm=st.sampled_from(CLIP_NORMS))
@example(rows=[[3.4e38] * 5, [1e-45] * 5, [math.nan, 1.0, 1.0, 1.0, 1.0], [0.0] * 5], clip_norm=1.0)
def test_no_row_and_no_sum_exceeds_its_sensitivity(rows, clip_norm):
    """In exact arithmetic, each contribution keeps the bound, and so does the sum's change when one is zeroed out."""
    matrix = torch.tensor(rows, dtype=torch.float32)
    bits = grid_bits(clip_norm * len(rows), 0.0)
    contributions = clipped(matrix, clip_norm, bits)
    bound = Fraction(clip_norm) ** 2
    assert all(exact_norm(row, bits) <= bound for row in contributions)
    lanes, whole = torch.zeros(len(rows), dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64)
    clipped_sums(matrix, torch.ones(len(rows), dtype=torch.bool), lanes, clip_norm, bits, whole)
    for left_out in range(len(rows)):
        mask = torch.ones(len(rows), dtype=torch.bool)
        mask[left_out] = False
        without = torch.zeros(1, 5, dtype=torch.int64)
        clipped_sums(matrix, mask, lanes, clip_norm, bits, without)
        assert exact_norm((whole - without)[0], bits) <= bound


def test_random_rows_around_the_bound_do_not_exceed_it():
    """Clipping in float32 fails for rows whose norm is C, and for large rows that are scaled down to C."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 64, generator=generator)
    rows *= (1 / rows.norm(dim=1) * torch.logspace(-1, 4, 2000)).unsqueeze(1)
    bits = grid_bits(2000.0, 0.0)
    norms = [exact_norm(row, bits) for row in clipped(rows, 1.0, bits)]
    assert max(norms) <= 1
    large = [norm for norm, row in zip(norms, rows) if row.norm() > 1]
    assert min(large) > (1 - 2e-6) ** 2, "clipped rows keep all of C except the margin"
    naive = rows * (1.0 / rows.norm(dim=1, keepdim=True)).clamp(max=1.0)
    assert (naive.double().norm(dim=1) > 1).any(), "clipping in float32 exceeds the bound"


def test_small_rows_do_not_change():
    rows = torch.tensor([[0.25, -0.5, 0.125], [0.0, 0.0, 0.0]])
    bits = grid_bits(10.0, 0.0)
    assert torch.equal(clipped(rows, 1.0, bits).double() * 2.0**-bits, rows.double())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_counts_as_zero(bad):
    rows = torch.tensor([[bad, 1.0], [0.5, 0.5]])
    assert clipped(rows, 1.0, 40).tolist() == [[0, 0], [2**39, 2**39]]


@pytest.mark.parametrize("clip_norm", CLIP_NORMS)
def test_the_grid_has_room_for_the_sum_and_the_noise(clip_norm):
    count, multiplier = 100_000, 20.0
    bits = grid_bits(clip_norm * count, clip_norm * multiplier)
    largest = int(clipped(torch.tensor([[clip_norm * 5]]), clip_norm, bits)) * count
    noise = math.ceil(NOISE_RANGE * multiplier * clip_norm * 2.0**bits)
    assert largest + noise < 2**62 + 1
    assert 2**51 <= noise <= 2**52 + 1, "every multiple of the grid's step can be drawn"


def test_noise_is_normal():
    """Moments within five standard errors, and the distribution function, over 10^6 draws."""
    keys = fold_in(torch.tensor(7), torch.arange(1000))
    draws = keyed_normal(keys, 1000)
    count = draws.numel()
    assert abs(draws.mean()) < 5 / math.sqrt(count)
    assert abs(draws.square().mean() - 1) < 5 * math.sqrt(2 / count)
    assert abs(draws.pow(3).mean()) < 5 * math.sqrt(15 / count)
    assert abs(draws.pow(4).mean() - 3) < 5 * math.sqrt(96 / count)
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-4
    beyond_four = 2 * stats.norm.sf(4) * count
    assert 0 < (draws.abs() > 4).sum() < beyond_four + 5 * math.sqrt(beyond_four)


def test_rows_and_columns_of_noise_are_uncorrelated():
    draws = keyed_normal(fold_in(torch.tensor(3), torch.arange(200)), 5000)
    across_rows = torch.corrcoef(draws)[~torch.eye(200, dtype=torch.bool)]
    assert across_rows.abs().max() < 6 / math.sqrt(5000)
    lagged = (draws[:, 1:] * draws[:, :-1]).mean()
    assert abs(lagged) < 5 / math.sqrt(draws.numel())


def test_noise_is_a_function_of_its_key_alone():
    keys = fold_in(torch.tensor(5), torch.arange(4))
    together = keyed_normal(keys, 96)
    for row, key in enumerate(keys):
        assert torch.equal(keyed_normal(key.view(1), 96)[0], together[row])
    assert len({float(value) for value in together[:, 0]}) == 4


def test_results_do_not_depend_on_the_blocks(monkeypatch):
    keys, deviations = torch.tensor([3, 4]), torch.tensor([1.0, 2.0], dtype=torch.float64)
    rows = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    whole = noise_on_grid(keys, 1000, deviations, 40, False), keyed_normal(keys, 1000), row_norms(rows)
    monkeypatch.setitem(mechanisms._BLOCK_ELEMENTS, "cpu", 128)
    assert len(list(mechanisms.column_blocks(rows))) == 16
    parts = noise_on_grid(keys, 1000, deviations, 40, False), keyed_normal(keys, 1000), row_norms(rows)
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])
    torch.testing.assert_close(parts[2], whole[2], rtol=1e-14, atol=0)


@pytest.mark.parametrize("secure", [False, True])
def test_noise_on_the_grid_has_its_standard_deviation(secure):
    deviations = torch.tensor([0.5, 3.0], dtype=torch.float64)
    bits = 40
    noise = noise_on_grid(torch.tensor([1, 2]), 200_000, deviations, bits, secure)
    assert noise.dtype == torch.int64
    measured = (noise.double() * 2.0**-bits).std(dim=1)
    assert torch.all((measured / deviations - 1).abs() < 5 / math.sqrt(2 * 200_000))
    assert noise.double().abs().max() <= NOISE_RANGE * 3.0 * 2.0**bits


def test_secure_noise_is_normal_and_never_the_same():
    draws = noise_on_grid(torch.zeros(1, dtype=torch.int64), 200_000, torch.ones(1).double(), 40, secure=True)[0]
    draws = draws.double() * 2.0**-40
    assert stats.kstest(draws.numpy(), "norm").pvalue > 1e-6
    assert not torch.equal(secure_bits((4,)), secure_bits((4,)))
    assert secure_bits((0,)).shape == (0,)
