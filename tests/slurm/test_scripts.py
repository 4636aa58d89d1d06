"""The scripts in slurm/ requeue their jobs in the right cases; Slurm's programs and Python are stand-ins."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from .conftest import ENVIRONMENT, SCRIPTS
from .test_train import CONFIG

PROGRAMS = {
    "scontrol": """case $1 in
    requeue) echo "$*" >>calls ;;
    *) echo "JobId=5 JobState=RUNNING Requeue=1 Restarts=$SLURM_RESTART_COUNT " ;;
    esac""",
    "squeue": """case "$END" in "") echo NONE ;; *) echo $(($(date +%s) + END)) ;; esac""",
    "srun": """[ -z "$LOST" ] || [[ "$*" != *--overlap*"--nodes=$LOST "* ]] || exit 1
    while [[ $1 == --* ]]; do [ "$1" != --output ] || shift; shift; done; exec "$@" """,
    "program": """case "$*" in
    *"sweep list"*) echo '[{"index": 0}, {"index": 1}, {"index": 2}]' ;;
    *) echo "$*" >>calls; exit $CODE ;;
    esac""",
}
CELLS = [f"python -m fedpeft_dist sweep run sweep.yaml --index {i}" for i in range(3)]
REQUEUED = "requeue 5_0"


@dataclass
class Slurm:
    folder: Path

    def run(self, script: str, **variables: str) -> tuple[int, list[str], str]:
        """A script as the task 5_0 of an array: its exit code, its steps and requeues, and what it says."""
        here = {
            "PATH": f"{self.folder}:{ENVIRONMENT['PATH']}",
            "FEDPEFT_RUN": "program",
            "FEDPEFT_VENV": "",
            "FEDPEFT_CELLS_PER_TASK": "3",
            "FEDPEFT_REPOSITORY": str(SCRIPTS.parent),
            "SLURM_JOB_ID": "5",
            "SLURM_ARRAY_JOB_ID": "5",
            "SLURM_ARRAY_TASK_ID": "0",
            "SLURM_RESTART_COUNT": "0",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURMD_NODENAME": "n1",
            "CODE": "0",
            "END": "",
            "LOST": "",
        }
        command = ["bash", str(SCRIPTS / script), "sweep.yaml"]
        environment = ENVIRONMENT | here | variables
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60)
        calls = self.folder / "calls"
        return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stderr


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    for name, text in PROGRAMS.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)
    return Slurm(tmp_path)


@pytest.mark.parametrize(
    ("variables", "is_late"),
    [
        ({}, False),  # no time limit
        ({"END": "200"}, False),
        ({"END": "140"}, True),  # the warning for 120 s may have come
        ({"END": "140", "SBATCH_SIGNAL": "USR1@60"}, False),
        ({"END": "200", "SBATCH_SIGNAL": "B:USR1@0300"}, True),
        ({"END": "140", "SECONDS": "10"}, False),  # the limit is too short to wait for the next attempt
    ],
)
def test_no_cell_begins_near_the_time_limit(slurm: Slurm, variables: dict[str, str], is_late: bool) -> None:
    code, calls, said = slurm.run("sweep.sh", **{"SECONDS": "1000", **variables})
    assert (code, calls) == ((75, [CELLS[0], REQUEUED]) if is_late else (0, CELLS)), said
    assert said == ("cell 1 is left to the next attempt: the time limit is near\n" if is_late else "")


@pytest.mark.parametrize(
    ("variables", "is_requeued"),
    [
        ({"SLURM_RESTART_COUNT": "99"}, True),
        ({"SLURM_RESTART_COUNT": "100"}, False),
        ({"SLURM_RESTART_COUNT": "100", "FEDPEFT_MAX_REQUEUES": "101"}, True),
        ({"FEDPEFT_MAX_REQUEUES": "0"}, False),
    ],
)
def test_requeues_are_limited(slurm: Slurm, variables: dict[str, str], is_requeued: bool) -> None:
    code, calls, said = slurm.run("train.sh", CODE="75", **variables)
    assert (code, calls[1:]) == (75, [REQUEUED] if is_requeued else []), said
    if is_requeued:
        assert said == ""
    else:
        (line,) = said.splitlines()
        assert line.startswith("error: job 5_0 was requeued ")
        assert "FEDPEFT_MAX_REQUEUES" in line


@pytest.mark.parametrize(
    ("variables", "is_requeued"),
    [
        ({"LOST": "2"}, True),  # nothing starts on two nodes
        ({}, False),
        ({"LOST": "1"}, False),  # nor on this one: it is not the nodes that are at fault
        ({"LOST": "2", "CODE": "2"}, False),
        ({"LOST": "2", "SLURM_JOB_NUM_NODES": "1"}, False),
    ],
)
def test_a_job_that_loses_a_node_is_requeued(slurm: Slurm, variables: dict[str, str], is_requeued: bool) -> None:
    code, calls, said = slurm.run("train.sh", **{"CODE": "1", **variables})
    assert (code, calls[1:]) == (int(variables.get("CODE", 1)), [REQUEUED] if is_requeued else []), said
    assert said == ("a node of job 5_0 does not answer\n" if is_requeued else "")


@pytest.mark.parametrize(
    ("variables", "is_requeued"),
    [({"LOST": "2"}, True), ({}, False), ({"LOST": "2", "SLURM_RESTART_COUNT": "100"}, False)],
)
def test_a_submitit_job_that_loses_a_node_is_requeued(
    slurm: Slurm, variables: dict[str, str], is_requeued: bool
) -> None:
    (slurm.folder / "run.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    submit = [sys.executable, str(SCRIPTS.parent / "launch" / "submit.py"), "run.yaml", "--nodes=2", "--dry-run"]
    options = ("--setup=set -e", "--setup=trap 'echo cleaned up >>calls' EXIT")
    script = subprocess.run([*submit, *options], cwd=slurm.folder, capture_output=True, text=True, check=True).stdout
    (slurm.folder / "job").write_text(script.replace(sys.executable, "program"), encoding="utf-8")
    code, calls, said = slurm.run(str(slurm.folder / "job"), CODE="1", **variables)
    assert (code, calls[1:]) == (1, [REQUEUED] * is_requeued + ["cleaned up"]), said


def test_no_cell_begins_after_the_loss_of_a_node(slurm: Slurm) -> None:
    assert slurm.run("sweep.sh", CODE="1", LOST="2") == (
        75,
        [CELLS[0], REQUEUED],
        "a node of job 5_0 does not answer\n",
    )


def test_invalid_numbers_are_refused_in_one_line(slurm: Slurm) -> None:
    code, calls, said = slurm.run("train.sh", FEDPEFT_MAX_REQUEUES="many")
    assert (code, calls, said) == (2, [], "error: FEDPEFT_MAX_REQUEUES: 'many' is no number\n")
