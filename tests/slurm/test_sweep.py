"""slurm/sweep.sh: one command runs every cell of a sweep, with the results of one plain process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from .conftest import ENDED, Cluster, Job, assert_same_run, run_plainly, wait_until
from .test_train import CONFIG


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = {**CONFIG, "federation": {"rounds": 2, "cohort": 2}, "client": {"epochs": 1, "batch_size": 64}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    return tmp_path


def write_sweep(folder: Path, **keys: object) -> None:
    tree = {"base": "base.yaml", "output": "out", **keys}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def array_of(first: Job) -> dict[int, str]:
    """The tasks of the array that a job has submitted, and their states."""
    return {number: state for number, state in first.cluster.states().items() if number > first.number}


def test_every_cell_is_run_over_two_nodes(cluster: Cluster, folder: Path) -> None:
    write_sweep(folder, axes={"client.optimizer.lr": [0.01, 0.1, 0.2]})
    first = cluster.submit("sweep.sh", "sweep.yaml", cwd=folder, options="--nodes=2 --ntasks-per-node=2 --time=9")
    run_plainly(folder, "sweep", "run", "sweep.yaml", "output.root=plain")
    assert first.wait() == "COMPLETED", first.read_log()
    wait_until(lambda: set(array_of(first).values()) <= ENDED, 480, "the end of the array")
    array = array_of(first)
    assert list(array.values()) == ["COMPLETED"] * 2
    asked = cluster.run("squeue", "--noheader", "--states=all", f"--jobs={min(array)}", "--format=%D %C %l")
    assert asked.splitlines()[0] == "2 4 9:00"
    cells = sorted(path.name for path in (folder / "plain").iterdir())
    assert len(cells) == 3
    for cell in cells:
        assert_same_run(folder / "out" / cell, folder / "plain" / cell)
        assert json.loads((folder / "out" / cell / "summary.json").read_text())["world_size"] == 4
    report = json.loads(run_plainly(folder, "report", "out", "--json"))
    assert len(report["runs"]) == 3


STAND_IN = """#!/bin/bash
case "$*" in *"sweep list"*) echo '[{"index": 0}, {"index": 1}, {"index": 2}]'; exit ;; esac
echo begun
trap 'exit 75' TERM USR1
for _ in $(seq 50); do sleep 0.1; done
"""


def test_a_signal_stops_its_own_task_and_the_array_is_submitted_once(cluster: Cluster, folder: Path) -> None:
    program = folder / "program"  # of three cells, each of which takes 5 s or until it is told to stop
    program.write_text(STAND_IN)
    program.chmod(0o755)
    first = cluster.submit("sweep.sh", "sweep.yaml", cwd=folder, FEDPEFT_RUN=str(program))
    logs = "slurm-*_[12].out"
    wait_until(lambda: sum("begun" in log.read_text() for log in folder.glob(logs)) == 2, 30, "the array")
    array = min(array_of(first))  # its last task bears the array's own number
    cluster.run("scancel", "--signal=USR1", f"{array}_2")
    cluster.run("scontrol", "requeue", str(first.number))
    wait_until(lambda: {first.state, *array_of(first).values()} == {"COMPLETED"}, 60, "the end of all")
    assert len(array_of(first)) == 2
    shown = cluster.run("scontrol", "--oneliner", "show", "job", str(array)).splitlines()
    restarts = {re.search(r"ArrayTaskId=(\d+)", line)[1]: re.search(r"Restarts=(\d+)", line)[1] for line in shown}
    assert (first.show()["Restarts"], restarts) == ("1", {"1": "0", "2": "1"})


UNWARNED = """#!/bin/bash
case "$*" in *"sweep list"*) echo '[{"index": 0}, {"index": 1}]'; exit ;; esac
trap "" USR1
[ -n "${SLURM_RESTART_COUNT:-}" ] || sleep $((35 + 65 * ${!#}))
"""


@pytest.mark.slow
def test_no_warning_is_missed_between_two_cells(cluster: Cluster, folder: Path) -> None:
    program = folder / "program"  # at first, its first cell leaves 25 s of the job's minute, and its second needs more
    program.write_text(UNWARNED)
    program.chmod(0o755)
    variables = {"FEDPEFT_RUN": str(program), "FEDPEFT_CELLS_PER_TASK": "2", "SBATCH_SIGNAL": "USR1@5"}
    job = cluster.submit("sweep.sh", "sweep.yaml", cwd=folder, options="--time=1", **variables)
    assert job.wait() == "COMPLETED", job.read_log()
    assert job.show()["Restarts"] == "1"
    assert "cell 1 is left to the next attempt" in job.read_log()


def test_a_failed_cell_does_not_stop_the_next(cluster: Cluster, folder: Path) -> None:
    write_sweep(folder, cells={"impossible": {"data.clients": 5000}, "possible": {"method": {"name": "head"}}})
    job = cluster.submit("sweep.sh", "sweep.yaml", cwd=folder, options="--array=0", FEDPEFT_CELLS_PER_TASK="2")
    assert job.wait() == "FAILED"
    assert job.show()["ExitCode"] == "2:0"
    assert "cell 0 ended with exit code 2" in job.read_log()
    assert (folder / "out" / "possible-seed1" / "summary.json").exists()


def test_more_tasks_than_an_array_may_have_are_refused(cluster: Cluster, folder: Path) -> None:
    write_sweep(folder, seeds=list(range(1002)), cells={"one": {"method": {"name": "head"}}})
    job = cluster.submit("sweep.sh", "sweep.yaml", cwd=folder)
    assert job.wait() == "FAILED"
    assert job.read_log() == (
        "error: the 1002 cells make 1002 tasks, but an array here has 1001 at most; set FEDPEFT_CELLS_PER_TASK to 2 "
        "or more\n"
    )
