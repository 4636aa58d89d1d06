"""The audit of the privacy mechanisms: the right ones keep their claim under attack, broken ones are caught."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from .cases import SEED, make_runtime

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "privacy_audit.py"


def load_program():
    specification = importlib.util.spec_from_file_location("privacy_audit", PROGRAM)
    program = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(program)
    return program


program = load_program()
audit, lower_bound = program.audit, program.lower_bound


@pytest.fixture(scope="module", params=["SampleMechanism", "UserMechanism"])
def mechanism(request):
    return getattr(program, request.param)(make_runtime(), SEED)


def test_the_right_mechanism_keeps_its_claim_and_the_attack_has_power(mechanism):
    found = audit(mechanism, program.RIGHT, 5000)
    assert 0.15 * found["claimed_epsilon"] < found["lower_bound"] < found["claimed_epsilon"]


def test_a_mechanism_without_clipping_is_caught(mechanism):
    found = audit(mechanism, "no clipping", 600)
    assert found["lower_bound"] > found["claimed_epsilon"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["half the noise", "no sampling"])
def test_a_broken_mechanism_is_caught(mechanism, fault):
    found = audit(mechanism, fault, 12_000)
    assert found["lower_bound"] > found["claimed_epsilon"]


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_bound_holds_and_is_nearly_reached_where_epsilon_is_known(epsilon):
    """Randomised response, whose epsilon is exact: a bound of 95 % confidence fails in at most 5 % of repetitions."""
    honesty, repetitions = 1 / (1 + math.exp(-epsilon)), 400
    rng = np.random.default_rng(SEED)
    bounds = []
    for _ in range(repetitions):
        absent, present = (rng.random((2, 2000)) < [[1 - honesty], [honesty]]).astype(float)
        bounds.append(lower_bound(absent, present, dp_delta=0.0))
    failures = sum(bound > epsilon for bound in bounds)
    assert failures <= 0.05 * repetitions + 3 * math.sqrt(0.05 * 0.95 * repetitions)
    assert 0.7 * epsilon < np.median(bounds) < epsilon


def test_no_difference_is_no_bound():
    scores = np.random.default_rng(SEED).standard_normal((2, 4000))
    assert lower_bound(*scores, dp_delta=1e-3) < 0.1
    assert lower_bound(np.zeros(4000), np.zeros(4000), dp_delta=1e-3) == 0.0
