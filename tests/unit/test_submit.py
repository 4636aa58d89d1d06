"""launch/submit.py without Slurm: dry runs, refusals, and jobs on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fedpeft_dist.reports.runs import read_runs
from fedpeft_dist.tracking.run_directory import COMPLETE, INTERRUPTED, RunDirectory
from tests.real_runs import LATE_SIGNALS
from tests.tiny import tiny_tree

SUBMIT = Path(__file__).parents[2] / "launch" / "submit.py"
BASE = tiny_tree(
    method={"name": "bias"},
    data={"name": "digits"},
    federation={"rounds": 12, "cohort": 4},
    client={"epochs": 4},
    output={"root": "runs", "name": "run"},
)
SWEEP = {"base": "base.yaml", "output": "cells", "axes": {"client.optimizer.lr": [0.01, 0.1]}, "seeds": [1, 2]}
LOAD = """
import pickle, sys, cloudpickle
with open(sys.argv[1], "rb") as file:
    job = pickle.load(file).function
again = pickle.loads(cloudpickle.dumps(job.checkpoint())).function
assert again == job
print(again.folder, *(cell.name for cell in again.cells))
"""

IS_RUNNING = """
import runpy, sys, types
is_running = runpy.run_path(sys.argv[1])["_is_running"]
is_running.__globals__["time"] = types.SimpleNamespace(sleep=print)
print(is_running("17"))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder where the command is called."""
    path = tmp_path / "called here"
    path.mkdir()
    (path / "base.yaml").write_text(yaml.safe_dump(BASE), encoding="utf-8")
    (path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP), encoding="utf-8")
    return path


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment with a torch that cannot be imported, and a Slurm that accepts every job and runs none."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "torch.py").write_text("raise RuntimeError('torch is imported')")
    (programs / "srun").touch(0o755)
    (programs / "sbatch").touch(0o755)
    (programs / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 7\n")
    return os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(programs)}


def call(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """Calls the command; returns its output."""
    return run(folder, environment, str(SUBMIT), *arguments).stdout


def run(
    folder: Path, environment: dict[str, str] | None, *arguments: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=check, timeout=300
    )


def test_a_dry_run_shows_the_job_and_leaves_nothing(folder: Path, environment: dict[str, str]) -> None:
    before = sorted(folder.rglob("*"))
    options = [
        *("--nodes=2", "--tasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8", "--time=90", "--partition=gpu"),
        *("--account=us", "--qos=long", "--constraint=a100", "--signal-delay=300", "--slurm=mem=64G"),
        *("--slurm=exclusive", "--setup=module load cuda", "--setup=base.yaml", "--dry-run"),
    ]
    lines = call(folder, "base.yaml", *options, environment=environment).splitlines()
    directives = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    for directive in (
        *("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=8", "time=90", "partition=gpu"),
        *("account=us", "qos=long", "constraint=a100", "signal=USR2@300", "mem=64G", "exclusive", "requeue"),
        *("job-name=run", "open-mode=append"),
    ):
        assert directive in directives
    assert lines.index("module load cuda") + 1 == lines.index(f". {shlex.quote(str(folder / 'base.yaml'))}")
    assert lines[-1] == "# slurm job 0, ranks: 8, cells: run"
    assert sorted(folder.rglob("*")) == before


def test_complete_cells_are_not_submitted(folder: Path, environment: dict[str, str]) -> None:
    RunDirectory(folder / "cells" / "lr0.01-seed2").write_state(COMPLETE, 12)
    shown = call(
        folder, "sweep.yaml", "--cells-per-task=2", "--array-parallelism=1", "--dry-run", environment=environment
    )
    assert "#SBATCH --array=0-1%1\n" in shown
    jobs = [line for line in shown.splitlines() if line.startswith("# slurm")]
    assert jobs == [
        "# slurm job 0, ranks: 1, cells: lr0.01-seed1, lr0.1-seed1",
        "# slurm job 1, ranks: 1, cells: lr0.1-seed2",
    ]


def test_a_submitted_job_keeps_its_cells_and_folder(folder: Path, environment: dict[str, str]) -> None:
    shown = call(folder, "sweep.yaml", "federation.rounds=3", "--cells-per-task=3", environment=environment)
    assert re.match(r"submitted: slurm job 7; jobs: 2, cells: 4, ranks: 1\nlogs:      cells/jobs/", shown)
    assert shown.endswith("; fedpeft sweep list sweep.yaml federation.rounds=3\n")
    first, second = sorted(folder.glob("cells/jobs/*/7_*_submitted.pkl"))
    loaded = run(folder.parent, environment, "-c", LOAD, str(first)).stdout
    assert loaded == f"{folder} lr0.01-seed1 lr0.01-seed2 lr0.1-seed1\n"
    assert run(folder.parent, environment, "-c", LOAD, str(second)).stdout == f"{folder} lr0.1-seed2\n"
    call(folder, "sweep.yaml", environment=environment)
    assert len(list((folder / "cells" / "jobs").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bose.yaml", "bose.yaml: no such config file; did you mean base.yaml?"),
        ("sweep.yaml client.epoch=2", "sweep.yaml, cell lr0.01-seed1: client.epoch: unknown key; did you mean"),
        ("base.yaml --slurm time=10", "--slurm: 'time' is settled by this command's own options"),
        ("base.yaml --slurm 64G", "--slurm: '64G' is no option of sbatch; give key=value, such as mem=64G"),
        ("base.yaml --time 2", "--signal-delay: 120 s of the 120 s that a job has; give less"),
        ("sweep.yaml --nodes 2 --cells-per-task 2", "--cells-per-task: 2, but 2 ranks run one cell together; give 1"),
        ("base.yaml --nodes 2 --cluster local", "--nodes: 2, but --cluster local is this machine; give 1"),
        ("base.yaml --tasks-per-node 2 --cluster debug", "--tasks-per-node: 2, but --cluster debug is this process"),
        ("base.yaml output.root=a%j", "{folder}/a%j/run: Slurm and submitit take % for a pattern in the paths of logs"),
        ("base.yaml output.name=50% --dry-run", "{folder}/runs/50%: Slurm and submitit take % for a pattern"),
        ("$NOWHERE/base.yaml", "Invalid value for 'CONFIG|SWEEP': '$NOWHERE/base.yaml': the environment variable"),
        ("base.yaml --cluster pbs", "Invalid value for '--cluster': "),
        ("base.yaml", "sbatch refuses: invalid partition specified: x; Batch job submission failed"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    folder: Path, environment: dict[str, str], tmp_path: Path, arguments: str, message: str
) -> None:
    said = "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed"
    (tmp_path / "programs" / "sbatch").write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    before = sorted(folder.rglob("*"))
    environment["PYTHONPATH"] = ""  # the end with an error may import torch
    done = run(folder, environment, str(SUBMIT), *arguments.split(), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message.replace('{folder}', str(folder))}")
    assert sorted(folder.rglob("*")) == before


def test_a_run_of_another_config_is_found_at_submission(folder: Path, environment: dict[str, str]) -> None:
    run_folder = RunDirectory(folder / "runs" / "run")
    run_folder.write_state("interrupted", 3)
    run_folder.config_file.write_text(yaml.safe_dump(BASE | {"seed": 7}))
    done = run(folder, environment, str(SUBMIT), "base.yaml", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: runs/run: other config: its run cannot go on")


def test_a_local_job_of_two_ranks_goes_on_when_it_is_warned(folder: Path) -> None:
    shown = call(folder, "base.yaml", "--cluster=local", "--tasks-per-node=2", "--setup=echo set up")
    controller = int(re.match(r"submitted: local job (\d+)", shown)[1])
    found = RunDirectory(folder / "runs" / "run")

    def wait_until(condition) -> None:
        deadline = time.monotonic() + 200
        while not condition():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    log = next(iter(folder.glob("runs/run/jobs/*"))) / f"{controller}_0_log.out"
    wait_until(lambda: found.metrics_file.exists() and found.metrics_file.read_text().count("\n") >= 2)
    os.kill(json.loads((found.path / "owner.json").read_text())["pid"], signal.SIGUSR2)
    wait_until(lambda: (log.parent / f"{controller}_0_result.pkl").exists())
    assert "Requeued job" in log.read_text()
    assert (log.parent / "setup.out").read_text() == "set up\n"
    rows = [json.loads(row) for row in found.metrics_file.read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(1, 13))
    assert json.loads(found.summary_file.read_text())["world_size"] == 2
    assert call(folder, "base.yaml") == "nothing to submit: 1 complete in runs/run\n"
    assert [r.name for r in read_runs(folder / "runs")] == ["run"]


def test_a_late_warning_fails_no_job(folder: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """Slurm warns whenever the limit is near, and Python removes its handlers some time before it ends."""
    call(folder, "base.yaml", "federation.rounds=1", environment=environment)
    (jobs,) = (folder / "runs" / "run" / "jobs").iterdir()
    late = tmp_path / "late"
    late.mkdir()
    (late / "sitecustomize.py").write_text(LATE_SIGNALS)
    path = os.pathsep.join([str(late), *sys.path])
    variables = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "7", "PYTHONPATH": path}
    done = run(folder, os.environ | variables, "-m", "submitit.core._submit", str(jobs), check=False)
    assert (done.returncode, done.stderr[-13:]) == (0, "late signals\n"), done.stderr
    assert RunDirectory(folder / "runs" / "run").read_state()["state"] == COMPLETE


def test_a_job_that_has_used_up_its_time_limits_ends_as_interrupted(folder: Path, environment: dict[str, str]) -> None:
    options = ("federation.rounds=100000", "--time=1", "--signal-delay=20", "--max-timeouts=0")
    call(folder, "base.yaml", *options, environment=environment)
    found = RunDirectory(folder / "runs" / "run")
    (jobs,) = (found.path / "jobs").iterdir()
    variables = os.environ | {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "7"}
    command = [sys.executable, "-m", "submitit.core._submit", str(jobs)]
    with subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:
        while not found.metrics_file.exists():
            assert job.poll() is None
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR2)
        said = job.communicate(timeout=60)[1]
    assert job.returncode == 75, said
    assert "Traceback" not in said
    told = "Job not requeued because: timed-out too many times.\ninterrupted; submit it again to go on\n"
    assert said.endswith(told)
    assert found.read_state()["state"] == INTERRUPTED


@pytest.mark.parametrize("squeue", [None, "echo Socket timed out >&2; exit 1"])
def test_without_squeue_a_job_ends_as_interrupted(tmp_path: Path, squeue: str | None) -> None:
    if squeue:
        (tmp_path / "squeue").touch(0o755)
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    environment = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", IS_RUNNING, str(SUBMIT)], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == (["10"] * 4 + ["0"] if squeue else []) + ["False"], done.stderr
    assert "squeue does not answer (" + ("Socket timed out)" if squeue else "") in done.stderr
