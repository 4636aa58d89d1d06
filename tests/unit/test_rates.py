"""The factor on the client's learning rate, against values worked out by hand."""

from __future__ import annotations

import pytest

from fedpeft_dist.config import schema
from fedpeft_dist.training.rates import rate_factor


def factors(config: schema.ScheduleConfig, num_rounds: int) -> list[float]:
    return [rate_factor(config, round_number, num_rounds) for round_number in range(num_rounds)]


def test_constant() -> None:
    assert factors(schema.ConstantSchedule(name="constant"), 4) == [1.0] * 4


def test_exponential() -> None:
    schedule = schema.ExponentialSchedule(name="exponential", gamma=0.5)
    assert factors(schedule, 4) == [1.0, 0.5, 0.25, 0.125]


def test_cosine_goes_from_1_to_its_final_value() -> None:
    """cos at 0, 60 and 120 degrees is 1, 1/2 and -1/2; 180, where it reaches the end, is the round after the last."""
    assert factors(schema.CosineSchedule(name="cosine"), 3) == pytest.approx([1.0, 0.75, 0.25])
    above_zero = schema.CosineSchedule(name="cosine", final=0.2)
    assert factors(above_zero, 3) == pytest.approx([1.0, 0.8, 0.4])


def test_warm_up_climbs_in_equal_steps_and_the_cosine_takes_the_rest() -> None:
    schedule = schema.CosineSchedule(name="cosine", final=0.0, warmup=3)
    expected = [0.25, 0.5, 0.75, 1.0, 0.75, 0.25]
    assert factors(schedule, 6) == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("num_rounds", [1, 2, 5])
def test_no_run_is_too_short(num_rounds: int, warmup: int) -> None:
    schedule = schema.CosineSchedule(name="cosine", final=0.1, warmup=warmup)
    values = factors(schedule, num_rounds)
    assert all(0.0 < value <= 1.0 for value in values)
    climb = min(warmup, num_rounds)
    assert values[:climb] == sorted(values[:climb])
    assert values[climb:] == sorted(values[climb:], reverse=True)
    assert values[-1] > 0.1
