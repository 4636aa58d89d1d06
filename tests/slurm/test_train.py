"""slurm/train.sh: its jobs survive what happens to them, without help, and end with the same result."""

from __future__ import annotations

import re
import signal
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml

from fedpeft_dist.tracking.run_directory import RunDirectory

from .conftest import ENDED, Cluster, Job, assert_same_run, rounds, run_plainly, wait_until

CONFIG = {
    "backbone": {
        "name": "vit_tiny_patch16_224",
        "pretrained": False,
        "model_args": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    },
    "method": {"name": "bias"},
    "data": {
        "name": "synthetic",  # starts sooner than others
        "num_train": 1280,
        "num_test": 64,
        "image_size": 16,
        "clients": 4,
        "partition": {"name": "iid"},
    },
    "federation": {"rounds": 20, "cohort": 2},
    "client": {"epochs": 10, "batch_size": 32},
    "runtime": {"device": "cpu", "lanes": 1},
    "output": {"root": "runs", "name": "run"},
}
TWO_NODES = "--nodes=2 --ntasks-per-node=1"
ONE_NODE = "--nodes=1 --ntasks=2"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run by one plain process."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    run_plainly(folder, "train", "run.yaml")
    return folder / "runs" / "run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return tmp_path


def submit(cluster: Cluster, folder: Path, options: str) -> tuple[Job, Path]:
    """A job that is in the middle of its run."""
    job, run = cluster.submit("train.sh", "run.yaml", cwd=folder, options=options), folder / "runs" / "run"
    wait_until(lambda: len(rounds(run)) >= 2 or job.state in ENDED, 120, "the second round")
    assert job.state == "RUNNING", job.read_log()
    return job, run


def test_a_requeued_job_goes_on(cluster: Cluster, folder: Path, reference: Path) -> None:
    job, run = submit(cluster, folder, TWO_NODES)
    cluster.run("scontrol", "requeue", str(job.number))
    assert job.wait() == "COMPLETED", job.read_log()
    assert job.show()["Restarts"] == "1"
    assert_same_run(run, reference)


def test_a_preempted_job_makes_room_and_goes_on(cluster: Cluster, folder: Path, reference: Path) -> None:
    job, run = submit(cluster, folder, TWO_NODES)
    command = ("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    urgent = Job(int(cluster.run(*command, "--wrap=true")), folder / "urgent.log", cluster)
    assert urgent.wait() == "COMPLETED"
    assert RunDirectory(run).read_state()["state"] == "interrupted"
    assert job.wait() == "COMPLETED", job.read_log()
    assert job.show()["Restarts"] == "1"
    assert_same_run(run, reference)


def test_a_job_is_warned_of_its_time_limit_and_goes_on(cluster: Cluster, folder: Path, reference: Path) -> None:
    job, run = submit(cluster, folder, "--nodes=1 --ntasks=1 --time=1 --signal=USR1@20")
    wait_until(lambda: len(job.tasks()) == 1, 60, "its task")
    (task,) = job.tasks()
    # Slurm looks at time limits every 30 s. To be still at work then, the run would have to be long; so it is held.
    # On a slow machine, the warning may have come before.
    job.send(signal.SIGSTOP, [task])
    due = datetime.fromisoformat(job.show()["StartTime"]) + timedelta(seconds=45)
    wait_until(lambda: is_pending(signal.SIGUSR1, task) or datetime.now() > due, 60, "the warning")
    while not is_pending(signal.SIGUSR1, task) and datetime.now() < due + timedelta(seconds=30):
        for number, seconds in ((signal.SIGCONT, 0.1), (signal.SIGSTOP, 0.9)):  # a warning may still come; go on slowly
            job.send(number, [task])
            time.sleep(seconds)
    job.send(signal.SIGCONT, [task])
    assert job.wait() == "COMPLETED", job.read_log()
    assert int(job.show()["Restarts"]) >= 1
    assert_same_run(run, reference)


def is_pending(number: signal.Signals, process: int) -> bool:
    """Whether a process that is held has been sent a signal; one that has ended had it before."""
    try:
        pending = re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return True
    return bool(int(pending[1], 16) >> (number - 1) & 1)


def test_a_job_goes_on_elsewhere_when_its_node_is_lost(cluster: Cluster, folder: Path, reference: Path) -> None:
    job, run = submit(cluster, folder, ONE_NODE)
    lost, tasks = job.show()["BatchHost"], job.tasks()
    assert len(tasks) == 2
    # The lost node's tasks live on. They are held so that they are not done before the second attempt meets them.
    job.send(signal.SIGSTOP, tasks)
    cluster.stop_daemon(lost)
    try:
        wait_until(lambda: "waiting until it lets go" in job.read_log(), 120, "the second attempt")
        assert job.show()["BatchHost"] != lost
        job.send(signal.SIGCONT, tasks)
        assert job.wait() == "COMPLETED", job.read_log()
    finally:
        job.send(signal.SIGKILL, tasks)
        cluster.start_daemon(lost)
    assert job.show()["Restarts"] == "1"
    assert_same_run(run, reference)


@pytest.mark.slow
def test_a_job_goes_on_when_another_node_falls_silent(cluster: Cluster, folder: Path, reference: Path) -> None:
    job, run = submit(cluster, folder, TWO_NODES)
    (other,) = {"n1", "n2"} - {job.show()["BatchHost"]}
    with cluster.losing(other):
        wait_until(lambda: job.show()["Restarts"] == "1" or job.state in ENDED, 300, "the requeueing")
    assert job.wait() == "COMPLETED", job.read_log()
    assert job.show()["Restarts"] == "1"
    assert "a node of job" in job.read_log()
    assert_same_run(run, reference)


def test_a_cancelled_job_is_left_interrupted(cluster: Cluster, folder: Path) -> None:
    job, run = submit(cluster, folder, TWO_NODES)
    cluster.run("scancel", str(job.number))
    assert job.wait(60) == "CANCELLED"
    wait_until(lambda: not job.tasks(), 60, "the end of its tasks")
    assert RunDirectory(run).read_state()["state"] == "interrupted"
    assert job.show()["Restarts"] == "0"


def test_a_mistake_is_told_in_a_line(cluster: Cluster, folder: Path) -> None:
    missing = cluster.submit("train.sh", "missing.yaml", cwd=folder, options="--ntasks=1")
    nothing = cluster.submit("train.sh", cwd=folder, options="--ntasks=1")
    elsewhere = cluster.submit("train.sh", "run.yaml", cwd=folder, options="--ntasks=1", FEDPEFT_VENV="/nowhere")
    for job, message in (
        (missing, "error: missing.yaml: no such config file; did you mean run.yaml?"),
        (nothing, "error: usage: sbatch [options] slurm/train.sh CONFIG [key=value ...]"),
        (elsewhere, "error: no /nowhere/bin/python on"),
    ):
        assert job.wait() == "FAILED"
        assert job.show()["ExitCode"] == "2:0"
        (line,) = [line for line in job.read_log().splitlines() if line.startswith("error:")]
        assert line.startswith(message)
