"""Workers that share a sweep: real processes on real cells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fedpeft_dist.tracking.run_directory import COMPLETE, FAILED, RunDirectory
from tests.warm_process import Finished, run_fedpeft

BASE = {
    "backbone": {"name": "vit_tiny_patch16_224", "pretrained": False},
    "method": {"name": "bias"},
    "data": {
        "name": "synthetic",  # importing what digits come from takes each process two seconds
        "num_train": 512,
        "num_test": 64,
        "classes": 10,
        "image_size": 16,
        "clients": 4,
        "partition": {"name": "iid"},
    },
    "federation": {"rounds": 2, "cohort": 2},
    "client": {"epochs": 1, "batch_size": 64},
    "runtime": {"device": "cpu", "lanes": 2},
}
BASE["backbone"]["model_args"] = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


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


def start(sweep: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "fedpeft_dist", "sweep", "run", str(sweep), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=sweep.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(worker: subprocess.Popen) -> tuple[int, str, str]:
    output, errors = worker.communicate(timeout=300)
    return worker.returncode, output, errors


def run_sweep(sweep: Path, *arguments: str) -> Finished:
    return run_fedpeft(sweep.parent, "sweep", "run", str(sweep), *arguments)


def runs(sweep: Path) -> dict[str, RunDirectory]:
    return {path.parent.name: RunDirectory(path.parent) for path in sorted((sweep.parent / "out").glob("*/state.json"))}


def test_two_workers_divide_the_cells_and_a_failure_stops_neither(sweep: Path) -> None:
    results = [finish(worker) for worker in [start(sweep), start(sweep)]]
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


def test_a_cell_run_by_index_equals_train(sweep: Path) -> None:
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


def test_a_cell_in_work_is_left_alone_and_a_killed_worker_leaves_it_free(sweep: Path) -> None:
    slow = start(sweep, "--index", "0", "federation.rounds=100000")
    run = RunDirectory(sweep.parent / "out" / "lr0.01-seed1")
    deadline = time.monotonic() + 120
    while not run.metrics_file.exists():
        assert time.monotonic() < deadline
        assert slow.poll() is None
        time.sleep(0.1)
    code, _, errors = run_sweep(sweep, "--index", "0", "federation.rounds=100000")
    assert code == 2
    assert "another process is writing this run" in errors
    code, output, _ = run_sweep(sweep, "federation.rounds=1")
    assert code == 1
    assert output.splitlines()[-1] == "5 complete, 1 taken, 2 failed"
    slow.kill()
    slow.communicate()
    assert not run.in_use()


def test_a_cell_is_the_same_on_two_ranks_with_augmentation(sweep: Path) -> None:
    augmented = ("--index", "2", "data.augment=resized_crop_flip", "federation.cohort=3")
    assert run_sweep(sweep, *augmented, "output.root=ranks1").returncode == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *launcher, "-m", "fedpeft_dist", "sweep", "run", str(sweep), *augmented]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*command, "output.root=ranks2"], cwd=sweep.parent, env=environment, capture_output=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    one, two = (
        json.loads((sweep.parent / name / "lr0.1-seed1" / "summary.json").read_text()) for name in ("ranks1", "ranks2")
    )
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["weights_sha256"] == two["weights_sha256"]


def test_several_ranks_need_an_index(sweep: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "fedpeft_dist", "sweep", "run", str(sweep)]
    finished = subprocess.run(command, cwd=sweep.parent, capture_output=True, text=True, timeout=300)
    assert finished.returncode != 0
    assert "error: --index: missing; 2 ranks run one cell together, so say which" in finished.stderr
    assert not (sweep.parent / "out").exists()
