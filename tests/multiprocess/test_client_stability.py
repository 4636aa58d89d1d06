"""With all of participation's settings on, weights depend neither on the number of ranks nor on interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft_dist.tracking.run_directory import RunDirectory, read_metrics
from tests.multiprocess.exactness_worker import METHODS, make_config
from tests.participation_fixtures import AVAILABILITY, DEVICES, DROPOUT, write_trace

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
    "drawn": {
        "name": "weighted",
        "over_selection": 1.5,
        "availability": {"name": "on_off", "share": 0.8, "spread": 0.1, "rounds": 3},
        "dropout": {"name": "random", "before": 0.1, "during": 0.1, "after": 0.1},
        "devices": {"name": "lognormal", "samples_per_second": 10.0},
        "deadline": 4.0,
        "late": "partial",
    },
    "poisson": {
        "name": "poisson",
        "availability": {"name": "diurnal"},
        "dropout": {"name": "random", "during": 0.3},
        "devices": {"name": "lognormal", "samples_per_second": 10.0},
        "deadline": 3.0,
    },
}


def write_config(folder: Path, case: str, name: str) -> Path:
    tree = make_config(METHODS["prompt"], folder, name)
    participation = SETTINGS[case] | (traces(folder) if case == "traces" else {})
    tree["federation"] |= {"rounds": ROUNDS, "participation": participation}
    tree["server"] = {"optimizer": {"name": "yogi"}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(config: Path, ranks: int = 1) -> subprocess.Popen:
    """In a session of its own, so that all its processes can be killed at once."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] * (ranks > 1)
    command = [sys.executable, *launcher, "-m", "fedpeft_dist", "train", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def run(config: Path, ranks: int = 1, code: int = 0) -> str:
    """To its end; returns what it said to stderr."""
    process = start(config, ranks)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return errors


def rows_of(directory: RunDirectory) -> list[dict[str, Any]]:
    return read_metrics(directory.metrics_file) if directory.metrics_file.exists() else []


def wait_for_rounds(process: subprocess.Popen, directory: RunDirectory, count: int) -> None:
    while len(rows_of(directory)) < count:
        assert process.poll() is None
        time.sleep(0.02)


def kill_after(rounds: int, config: Path, ranks: int) -> None:
    """By SIGKILL, torchrun and the rank that writes; the others end by themselves when these are gone."""
    directory, process = RunDirectory(config.with_suffix("")), start(config, ranks)
    wait_for_rounds(process, directory, rounds)
    os.kill(directory.holder().pid, signal.SIGKILL)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert directory.read_state()["state"] != "complete", "it was killed too late"
    deadline = time.monotonic() + 120
    while directory.in_use():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def result(directory: RunDirectory) -> dict[str, Any]:
    """All that must be the same however a run was carried out."""
    timing = ("seconds", "evaluate_seconds", "samples_per_second", "peak_memory_bytes")
    rows = [{key: value for key, value in row.items() if key not in timing} for row in rows_of(directory)]
    summary = json.loads(directory.summary_file.read_text())
    return {"rows": rows, **{key: value for key, value in summary.items() if key not in (*timing, "world_size")}}


@pytest.mark.parametrize("case", ["traces", *(pytest.param(c, marks=pytest.mark.slow) for c in ("drawn", "poisson"))])
def test_weights_are_equal_on_1_and_2_ranks_and_through_a_kill(case: str, tmp_path: Path) -> None:
    whole, killed = (write_config(tmp_path, case, name) for name in ("whole", "killed"))
    run(whole, ranks=1)
    kill_after(4, killed, ranks=2)
    run(killed, ranks=2)
    whole, killed = (RunDirectory(config.with_suffix("")) for config in (whole, killed))
    assert result(killed) == result(whole)

    # What the comparison is for has happened.
    rows = rows_of(whole)
    assert len(rows) == ROUNDS
    assert len({row["cohort"] for row in rows}) > 2
    assert any(row["dropped"] for row in rows)
    assert any(row["partial"] if "late" in SETTINGS[case] else row["late"] for row in rows)
    assert case == "poisson" or any(row["surplus"] for row in rows)
    if case == "traces":
        lost = rows[LOST - 1]
        assert (lost["cohort"], lost["train_loss"], lost["samples"]) == (0, None, 0)
        assert lost["dropped"] == lost["selected"] > 0


def test_a_run_is_not_resumed_on_other_traces(tmp_path: Path) -> None:
    config = write_config(tmp_path, "traces", "run")
    process = start(config)
    wait_for_rounds(process, RunDirectory(tmp_path / "run"), 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    devices = tmp_path / "devices.csv"
    kept = devices.read_text()
    devices.write_text(kept.replace("\n3,13,", "\n3,14,"))
    assert "was begun with other traces" in run(config, code=2)
    devices.write_text(kept)
    run(config)
