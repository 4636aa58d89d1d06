"""Workers that share a sweep: real processes on real cells."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from fedpeft_dist.tracking.run_directory import COMPLETE, FAILED, RunDirectory
from tests.tiny import tiny_tree
from tests.warm_process import Finished, WarmProcess, WarmRanks, fedpeft, run_fedpeft

BASE = tiny_tree(
    method={"name": "bias"}, data={"num_train": 512, "num_test": 64, "classes": 10}, client={"batch_size": 64}
)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Six cells: four that run, one that cannot (more clients than samples), one more that runs."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE), encoding="utf-8")
    path = tmp_path / "sweep.yaml"
    tree = {
        "base": "base.yaml",
        "output": "out",
        "axes": {"client.optimizer.lr": [0.01, 0.1]},
        "cells": {"impossible": {"data.clients": 5000}, "last": {"method": {"name": "head"}}},
        "seeds": [1, 2],
    }
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def run_sweep(sweep: Path, *arguments: str) -> Finished:
    return run_fedpeft(sweep.parent, "sweep", "run", str(sweep), *arguments)


def runs(sweep: Path) -> dict[str, RunDirectory]:
    return {path.parent.name: RunDirectory(path.parent) for path in sorted((sweep.parent / "out").glob("*/state.json"))}


def test_two_workers_share_the_cells_and_a_failure_stops_nobody(sweep: Path) -> None:
    workers = [WarmProcess(fedpeft, sweep.parent, ["sweep", "run", str(sweep)]) for _ in range(2)]
    results = [worker.finish() for worker in workers]
    assert [code for code, _, _ in results] == [1, 1]
    for _, _, errors in results:
        assert "cell 4 impossible-seed1 failed: data.clients: 5000 is more than the 512 training samples" in errors
        assert "Traceback" not in errors
    found = runs(sweep)
    for seed in (1, 2):
        state = found.pop(f"impossible-seed{seed}").read_state()
        assert state["state"] == FAILED
        assert "data.clients: 5000" in state["error"]
    assert sorted(found) == [
        *("last-seed1", "last-seed2"),
        *("lr0.01-seed1", "lr0.01-seed2", "lr0.1-seed1", "lr0.1-seed2"),
    ]
    for run in found.values():
        assert run.read_state()["state"] == COMPLETE
        rows = run.metrics_file.read_text(encoding="utf-8").splitlines()
        assert [json.loads(row)["round"] for row in rows] == [1, 2]
    # Every cell was run by one of them; one that the other had just completed is told.
    completed = [int(output.splitlines()[-1].split(" complete")[0]) for _, output, _ in results if "complete" in output]
    assert sum(completed) - sum(output.count("already complete") for _, output, _ in results) == 6

    code, output, _ = run_sweep(sweep)
    assert code == 1
    assert output.splitlines()[-1] == "6 skipped, 2 failed"


def test_one_cell_by_its_index_is_the_same_run_as_train(sweep: Path) -> None:
    assert run_sweep(sweep, "--index", "3")[0] == 0
    found = runs(sweep)
    assert list(found) == ["lr0.1-seed2"]
    digest = json.loads(found["lr0.1-seed2"].summary_file.read_text())["weights_sha256"]
    keys = ("client.optimizer.lr=0.1", "seed=2", "output.root=alone", "output.name=run")
    assert run_fedpeft(sweep.parent, "train", "base.yaml", *keys).returncode == 0
    assert json.loads((sweep.parent / "alone" / "run" / "summary.json").read_text())["weights_sha256"] == digest

    code, output, _ = run_sweep(sweep, "--index", "3")
    assert code == 0
    assert "already complete" in output
    code, _, errors = run_sweep(sweep, "--index", "4")
    assert code == 2
    assert errors.startswith("error: data.clients: 5000")
    code, _, errors = run_sweep(sweep, "--index", "8")
    assert (code, errors) == (2, f"error: --index: 8 is no cell of {sweep}; give 0 to 7\n")
    code, _, errors = run_sweep(sweep, "--name", "bias-seed1")
    assert (code, errors) == (2, "error: --name: bias-seed1 goes with --index; give both, or neither\n")


def test_a_cell_in_work_is_left_alone_and_a_killed_worker_leaves_it_free(sweep: Path) -> None:
    slow = WarmProcess(fedpeft, sweep.parent, ["sweep", "run", str(sweep), "--index", "0", "federation.rounds=100000"])
    run = RunDirectory(sweep.parent / "out" / "lr0.01-seed1")
    deadline = time.monotonic() + 120
    while not run.metrics_file.exists():
        assert time.monotonic() < deadline
        assert slow.is_running
        time.sleep(0.1)
    code, _, errors = run_sweep(sweep, "--index", "0", "federation.rounds=100000")
    assert code == 2
    assert "another process is writing this run" in errors
    code, output, _ = run_sweep(sweep, "federation.rounds=1")
    assert code == 1
    assert output.splitlines()[-1] == "5 complete, 1 taken, 2 failed"
    slow.kill()
    assert not run.in_use()


def test_a_cell_is_the_same_on_two_ranks_with_augmentation(sweep: Path) -> None:
    augmented = ("--index", "2", "data.augment=resized_crop_flip", "federation.cohort=3")
    assert run_sweep(sweep, *augmented, "output.root=ranks1").returncode == 0
    with WarmRanks(2, sweep.parent, "sweep", "run", str(sweep), *augmented, "output.root=ranks2") as ranks:
        assert [done.returncode for done in ranks.finish()] == [0, 0], ranks.output
    one, two = (
        json.loads((sweep.parent / name / "lr0.1-seed1" / "summary.json").read_text()) for name in ("ranks1", "ranks2")
    )
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["weights_sha256"] == two["weights_sha256"]


def test_several_ranks_need_to_be_told_which_cell(sweep: Path) -> None:
    with WarmRanks(2, sweep.parent, "sweep", "run", str(sweep)) as ranks:
        assert all(done.returncode != 0 for done in ranks.finish())
        assert "error: --index: missing; 2 ranks run one cell together, so say which" in ranks.output
    assert not (sweep.parent / "out").exists()
