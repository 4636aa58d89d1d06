"""Killed at random moments, a run ends as if nothing had happened. A trial of each mode; by hand, give it thirty."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multiprocess.random_kills import MODES, run_trials


@pytest.mark.parametrize("mode", [MODES[0], *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[1:])])
def test_killed_at_random_moments(tmp_path: Path, mode: str) -> None:
    assert run_trials(mode, count=1, seed=7, folder=tmp_path, rounds=40) == 1
