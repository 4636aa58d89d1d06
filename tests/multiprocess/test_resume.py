"""A run that a signal stops, or that loses a rank, ends as if nothing had happened, also on another number of ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.multiprocess.exactness_worker import METHODS, make_config

ROUNDS = 60


def command(config: Path, num_ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)] * (num_ranks > 1)
    return [sys.executable, *launcher, "-m", "fedpeft_dist", "train", str(config)]


def write_config(output: Path, name: str) -> Path:
    tree = make_config(METHODS["prompt"], output, name)
    tree["federation"] |= {"rounds": ROUNDS, "evaluate_every": 10}
    tree["server"] = {"optimizer": {"name": "yogi"}}
    path = output / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_interrupted_run_goes_on_to_the_same_weights(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = write_config(tmp_path, "whole")
    subprocess.run(command(whole, 1), check=True, env=environment, timeout=200)
    expected = json.loads((tmp_path / "whole" / "summary.json").read_text())

    stopped, state_file = write_config(tmp_path, "stopped"), tmp_path / "stopped" / "state.json"
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    process = subprocess.Popen(command(stopped, 1), env=environment)
    wait_for_rounds(process, metrics, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    state = json.loads(state_file.read_text())
    assert state["state"] == "interrupted"
    assert 3 <= state["next_round"] < ROUNDS

    subprocess.run(command(stopped, 2), check=True, env=environment, timeout=200)
    assert json.loads(state_file.read_text())["state"] == "complete"
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert summary["world_size"] == 2
    for key in ("weights_sha256", "final_accuracy", "best_accuracy", "uplink_bytes_total", "rejected_total"):
        assert summary[key] == expected[key]
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    whole_rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in whole_rows]

    again = subprocess.run(command(stopped, 1), check=True, env=environment, capture_output=True, text=True)
    assert "already complete" in again.stdout


def test_a_killed_rank_is_restarted_by_torchrun_and_the_weights_are_the_same(tmp_path):
    """The restarted group meets under keys of its own in the agent's store, and goes on from the last checkpoint."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(write_config(tmp_path, "whole"), 1), check=True, env=environment, timeout=200)
    expected = json.loads((tmp_path / "whole" / "summary.json").read_text())["weights_sha256"]

    launcher, config = command(write_config(tmp_path, "killed"), 2), tmp_path / "killed"
    launcher.insert(launcher.index("--standalone"), "--max-restarts=1")
    process = subprocess.Popen(launcher, env=environment, stdout=subprocess.PIPE, text=True)
    wait_for_rounds(process, config / "metrics.jsonl", 3)
    os.kill(rank_processes(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    assert "going on after round" in output
    assert json.loads((config / "summary.json").read_text())["weights_sha256"] == expected


def test_a_restart_under_the_same_launch_leaves_an_interrupted_run_interrupted(tmp_path):
    """torchrun takes exit code 75 for a failure and starts the worker again; that must not undo the interruption."""
    launcher, state_file = command(write_config(tmp_path, "stopped"), 2), tmp_path / "stopped" / "state.json"
    launcher.insert(launcher.index("--standalone"), "--max-restarts=1")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(launcher, env=environment, stdout=subprocess.PIPE, text=True)
    wait_for_rounds(process, tmp_path / "stopped" / "metrics.jsonl", 3)
    os.kill(rank_processes(process)[1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    assert "a restart does not undo it" in output
    state = json.loads(state_file.read_text())
    assert state["state"] == "interrupted"
    assert state["next_round"] < ROUNDS


def rank_processes(process: subprocess.Popen) -> list[int]:
    """The workers of a torchrun."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(number) for number in found.stdout.split()]


def wait_for_rounds(process: subprocess.Popen, metrics: Path, count: int) -> None:
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        assert process.poll() is None
        time.sleep(0.02)
