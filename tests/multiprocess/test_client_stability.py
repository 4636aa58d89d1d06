"""Weights depend neither on the number of ranks nor on interruptions, with unstable clients and with privacy."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft_dist.tracking.run_directory import RunDirectory, read_metrics
from tests.multiprocess.exactness_worker import METHODS, make_config
from tests.participation_fixtures import AVAILABILITY, DEVICES, DROPOUT, write_trace
from tests.real_runs import complete, run_of, send, start_warm, wait_for_rounds

ROUNDS, CLIENTS, LOST = 14, 12, 6
"""Everyone is lost in round LOST."""
INTERVALS = ((0, 40), (40, 100))


def traces(folder: Path) -> dict[str, dict[str, str]]:
    availability = [(n, a, b, int((n + i) % 4 > 0)) for n in range(CLIENTS) for i, (a, b) in enumerate(INTERVALS)]
    losses = [
        (number, (5 * number + 7 * i) % CLIENTS, ("before", "during", "after")[i % 3])
        for number in range(1, ROUNDS + 1)
        for i in range(CLIENTS if number == LOST else number % 6)
    ]
    tables = {
        "availability": (AVAILABILITY, availability),
        "dropout": (DROPOUT, losses),
        "devices": (DEVICES, [(n, 4 + 3 * n, 20_000 + 1000 * n, 50_000) for n in range(CLIENTS)]),
    }
    return {
        name: {"name": "trace", "path": write_trace(folder / f"{name}.csv", *table)} for name, table in tables.items()
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "traces": {"over_selection": 1.3, "seconds_per_round": 7.0, "deadline": 2.5, "late": "partial"},
    "drawn, sample": {
        "name": "weighted",
        "availability": {"name": "on_off", "share": 0.8, "spread": 0.1, "rounds": 3},
        "dropout": {"name": "random", "before": 0.1, "during": 0.1, "after": 0.1},
        "devices": {"name": "lognormal", "samples_per_second": 10.0},
        "deadline": 4.0,
        "late": "partial",
    },
    "poisson, user": {
        "name": "poisson",
        "availability": {"name": "diurnal"},
        "dropout": {"name": "random", "during": 0.3},
        "devices": {"name": "lognormal", "samples_per_second": 10.0},
        "deadline": 3.0,
    },
}


PRIVACY: dict[str, dict[str, Any]] = {
    "traces": {"name": "none"},
    "drawn, sample": {"name": "sample", "epsilon": 8.0, "clip_norm": 2.0, "dp_delta": 0.01},
    "poisson, user": {"name": "user", "noise_multiplier": 0.5, "adaptive": {"quantile": 0.6, "count_noise": 2.0}},
}


def write_config(folder: Path, case: str, name: str) -> Path:
    tree = make_config(METHODS["prompt"], folder, name)
    participation = SETTINGS[case] | (traces(folder) if case == "traces" else {})
    tree["federation"] |= {"rounds": ROUNDS, "participation": participation}
    tree["server"] = {"optimizer": {"name": "yogi"}}
    tree["privacy"] = PRIVACY[case]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def result(directory: RunDirectory) -> dict[str, Any]:
    """All that must be the same however a run was carried out."""
    timing = ("seconds", "evaluate_seconds", "samples_per_second", "peak_memory_bytes")
    rows = [{key: value for key, value in row.items() if key not in timing} for row in rows_of(directory)]
    summary = json.loads(directory.summary_file.read_text())
    return {"rows": rows, **{key: value for key, value in summary.items() if key not in (*timing, "world_size")}}


def rows_of(directory: RunDirectory) -> list[dict[str, Any]]:
    return read_metrics(directory.metrics_file)


@pytest.mark.parametrize("case", [pytest.param("traces", marks=pytest.mark.slow), "drawn, sample", "poisson, user"])
def test_weights_are_equal_on_1_and_2_ranks_and_through_a_kill(case: str, tmp_path: Path) -> None:
    whole, killed = (write_config(tmp_path, case, name) for name in ("whole", "killed"))
    complete(whole)
    with start_warm(killed, ranks=2) as launched:
        wait_for_rounds(launched, run_of(killed), 4)
    assert run_of(killed).read_state()["state"] != "complete", "it was killed too late"
    complete(killed, ranks=2)
    whole, killed = run_of(whole), run_of(killed)
    assert result(killed) == result(whole)

    # The events that the comparison is for have happened.
    rows = rows_of(whole)
    assert len(rows) == ROUNDS
    assert len({row["cohort"] for row in rows}) > 2
    assert any(row["dropped"] for row in rows)
    assert any(row["partial"] if "late" in SETTINGS[case] else row["late"] for row in rows)
    if case == "traces":
        assert any(row["surplus"] for row in rows)
        lost = rows[LOST - 1]
        assert (lost["cohort"], lost["train_loss"], lost["samples"]) == (0, None, 0)
        assert lost["dropped"] == lost["selected"] > 0
    else:
        assert 0 < result(whole)["privacy"]["epsilon"] < 100


def test_a_run_is_not_resumed_on_other_traces(tmp_path: Path) -> None:
    config = write_config(tmp_path, "traces", "run")
    with start_warm(config) as launched:
        wait_for_rounds(launched, run_of(config), 3)
        send(launched.ranks[0].process.pid, signal.SIGTERM)
        assert launched.finish()[0].returncode == 75
    devices = tmp_path / "devices.csv"
    devices.write_text(devices.read_text().replace("\n3,13,", "\n3,14,"))
    with start_warm(config) as launched:
        assert launched.finish()[0].returncode == 2
        assert "was begun with other traces" in launched.output
