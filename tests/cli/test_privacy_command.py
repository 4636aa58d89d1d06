"""`fedpeft privacy`, as a user runs it: epsilon for noise and noise for epsilon, without training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Fedpeft, Finished, assert_tells, only_error_line

REPOSITORY = Path(__file__).parents[2]
QUICKSTART, PAPER = "configs/quickstart/bias.yaml", "configs/paper/cifar100/bias.yaml"
POISSON = "federation.participation.name=poisson"


class Command:
    """`fedpeft privacy`, from the repository's root."""

    def __init__(self, fedpeft: Fedpeft):
        self.fedpeft = fedpeft

    def __call__(self, *arguments: str) -> Finished:
        return self.fedpeft("privacy", *arguments)

    def plan(self, *arguments: str) -> dict:
        code, out, err = self(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)


@pytest.fixture
def privacy(fedpeft: Fedpeft, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(REPOSITORY)
    return Command(fedpeft)


def test_noise_for_epsilon_and_epsilon_for_noise(privacy: Command) -> None:
    """The client that has spent most with everybody's noise is the one that asks for most."""
    for_epsilon = privacy.plan(QUICKSTART, "privacy={name: sample, epsilon: 5.0}")
    assert 4.9 < for_epsilon["epsilon"] <= 5.0
    assert (for_epsilon["dp_delta"], for_epsilon["accountant"], for_epsilon["rounds"]) == (1e-3, "pld", 20)
    clients = for_epsilon["clients"]
    least, noise = for_epsilon["ranges"]["noise_multiplier"]
    assert 0 < least < noise
    assert clients["max"]["noise_multiplier"] == for_epsilon["noise_multiplier"] <= noise
    assert clients["max"]["steps"] == for_epsilon["steps"]
    assert clients["max"]["sampling_probability"] == for_epsilon["sampling_probability"] <= 1.0
    for_noise = privacy.plan(QUICKSTART, f"privacy={{name: sample, noise_multiplier: {noise}}}")
    assert for_noise["epsilon"] == pytest.approx(for_epsilon["epsilon"], rel=5e-3)
    assert for_noise["clients"]["median"]["epsilon"] < 3.0
    assert for_noise["ranges"]["steps"] == for_epsilon["ranges"]["steps"]


def test_users_need_no_data(privacy: Command) -> None:
    there = privacy.plan(PAPER, "privacy={name: user, noise_multiplier: 1.0}", POISSON, "data.root=absent")
    assert there["epsilon"] == pytest.approx(4.2, abs=0.05)
    assert (there["sampling_probability"], there["steps"], there["noise_multiplier"]) == (8 / 64, 50, 1.0)
    fixed = "privacy={name: user, noise_multiplier: 1.0, sampling: without_replacement}"
    assert privacy.plan(PAPER, fixed, "data.root=absent")["epsilon"] == pytest.approx(55.3, abs=0.05)


def test_people_read_a_table(privacy: Command) -> None:
    code, out, err = privacy(
        QUICKSTART, "privacy={name: sample, noise_multiplier: 1.0, stop_at_epsilon: 9.0, dp_delta: 0.01}"
    )
    assert code == 0, err
    lines = out.splitlines()
    rounds = int(lines[0].removeprefix(f"{QUICKSTART}: sample, ").removesuffix(" rounds"))
    assert 1 <= rounds < 20, "the budget ends the run"
    [epsilon] = [float(line.split()[1]) for line in lines if line.startswith("  epsilon")][:1]
    assert 0 < epsilon <= 9.0
    assert any(line.split() == ["over", "the", "clients", "min", "p25", "median", "p75", "max"] for line in lines)
    [warning] = err.splitlines()
    assert warning.startswith("warning: privacy.dp_delta: 0.01 is at least 1 / n for ")


def test_paper_noise_has_no_epsilon(privacy: Command) -> None:
    told = privacy.plan(PAPER, "privacy={name: paper_noise}", "data.root=absent")
    assert told["epsilon"] is None
    assert told["noise_std"] == pytest.approx(3.378, abs=5e-4)
    assert told["guarantee"] == "none"
    assert "carries no guarantee" in privacy(PAPER, "privacy={name: paper_noise}", "data.root=absent")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([QUICKSTART], ["privacy.name: none leaves nothing to account for", "sample or user"]),
        ([QUICKSTART, "privacy={name: sample}"], ["neither epsilon nor noise_multiplier"]),
        (
            [QUICKSTART, "privacy={name: sample, noise_multiplier: 1.0, stop_at_epsilon: 0.1}"],
            ["privacy.stop_at_epsilon: 0.1 is less than"],
        ),
        ([PAPER, "privacy={name: sample, epsilon: 5.0}", "data.root=absent"], ["data.root: 'absent'"]),
        (
            [PAPER, "privacy={name: user, noise_multiplier: 1.0, adaptive: {count_noise: 0.4}}", POISSON],
            ["privacy.adaptive.count_noise: 0.4", "more than 0.5"],
        ),
    ],
)
def test_a_mistake_is_one_line(privacy: Command, arguments: list[str], words: list[str]) -> None:
    code, _, err = privacy(*arguments)
    assert code == 2, err
    assert_tells(only_error_line(err), *words)
