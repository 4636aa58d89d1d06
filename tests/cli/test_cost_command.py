"""`fedpeft cost`, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Fedpeft

REPOSITORY = Path(__file__).parents[2]


def test_prints_one_json_object() -> None:
    """The real command, forbidden to download."""
    command = [sys.executable, "-m", "fedpeft_dist", "cost", "configs/paper/cifar100/bias.yaml", "--json"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    cost = json.loads(result.stdout)
    assert cost["trainable_parameters"] == 179_812
    assert cost["uplink_bytes_per_client"] == 719_248
    assert cost["uplink_bytes_per_round"] == 5_753_984
    assert cost["uplink_bytes_total"] == 287_699_200
    assert cost["share_of_full"] == pytest.approx(179_812 / 85_875_556)


def test_prints_a_table_for_people(fedpeft: Fedpeft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    code, out, err = fedpeft("cost", "configs/paper/cifar100/full.yaml", "federation.cohort=4")
    assert (code, err) == (0, "")
    for words in ("configs/paper/cifar100/full.yaml: full", "85,875,556", "327.589 MiB", "a round of 4 clients"):
        assert words in out
