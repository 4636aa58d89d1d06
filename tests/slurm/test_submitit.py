"""launch/submit.py: its jobs survive what happens to them, without help, and end with the same result."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from fedpeft_dist.tracking.run_directory import INTERRUPTED, RunDirectory
from tests.multiprocess.exactness_worker import METHODS, make_config

from .conftest import ENDED, ENVIRONMENT, Cluster, Job, assert_same_run, rounds, wait_until

SUBMIT = Path(__file__).parents[2] / "launch" / "submit.py"
SIGNAL_DELAY = 20
OTHER = {"n1": "n2", "n2": "n1"}
CELLS = ("lr0.01-seed5", "lr0.02-seed5")


@dataclass
class Whole:
    """The two runs of the sweep, by one plain process; the first is the one of the config."""

    folder: Path
    process: subprocess.Popen

    def run(self, index: int = 0) -> Path:
        assert self.process.wait(300) == 0
        return self.folder / CELLS[index]


@dataclass
class Submitted:
    """A job and the run that it is for."""

    job: Job
    run: Path

    def wait_for_rounds(self) -> None:
        wait_until(lambda: len(rounds(self.run)) >= 2, 240, f"the second round of {self.run.name}")

    def hold(self) -> int:
        """Stops the process of a job of one rank in the midst of a round; returns its number."""
        process = 0

        def is_held() -> bool:
            nonlocal process
            with suppress(OSError):  # it may be between two attempts
                process = json.loads((self.run / "owner.json").read_text())["pid"]
                os.kill(process, signal.SIGSTOP)
                return True
            return False

        self.wait_for_rounds()
        wait_until(is_held, 240, f"a process of {self.run.name}")
        return process

    def hold_until_warned(self) -> None:
        """Warns the job of its time limit. Slurm looks at limits every 30 s, and may itself end the hold."""
        process = self.hold()
        started = datetime.fromisoformat(self.job.show()["StartTime"])
        time.sleep(max(0, 60 - SIGNAL_DELAY + 1 - (datetime.now() - started).total_seconds()))
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)

    def finish(self, whole: Path) -> None:
        assert self.job.wait() == "COMPLETED", self.job.read_log()
        assert_same_run(self.run, whole)


def call_submit(cluster: Cluster, folder: Path, *arguments: str) -> tuple[str, Path]:
    """The job's number, and the log of its first rank."""
    told = cluster.run(sys.executable, str(SUBMIT), *arguments, cwd=folder)
    return re.search(r"slurm job (\d+)", told)[1], folder / re.search(r"tail -F (\S+)", told)[1]


def submit(cluster: Cluster, folder: Path, name: str, *options: str) -> Submitted:
    """A job for the config, in a run of this name."""
    number, log = call_submit(cluster, folder, "base.yaml", f"output.name={name}", *options)
    return Submitted(Job(int(number), log, cluster), folder / "runs" / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the commands are called; paths in the files are relative to it."""
    path = tmp_path_factory.mktemp("submitit")
    tree = make_config(METHODS["prompt"], Path("runs"), "run") | {"server": {"optimizer": {"name": "yogi"}}}
    tree["federation"] |= {"rounds": 12, "cohort": 12}
    tree["client"]["epochs"] = 5
    (path / "base.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    sweep = {"base": "base.yaml", "output": "cells", "axes": {"client.optimizer.lr": [0.01, 0.02]}}
    (path / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(folder: Path) -> Iterator[Whole]:
    command = [sys.executable, "-m", "fedpeft_dist", "sweep", "run", "sweep.yaml", "output.root=whole"]
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        yield Whole(folder / "whole", process)
        process.kill()


@pytest.mark.slow
def test_the_next_attempt_takes_over_from_a_lost_node(cluster: Cluster, folder: Path, whole: Whole) -> None:
    lost = submit(cluster, folder, "lost")
    process = lost.hold()
    node = lost.job.show()["NodeList"]
    cluster.stop_daemon(node)
    try:
        wait_until(lambda: "waiting until it lets go" in lost.job.read_log(), 120, "the second attempt")
        assert lost.job.show()["NodeList"] == OTHER[node]
        os.kill(process, signal.SIGCONT)
    finally:
        cluster.start_daemon(node)
    lost.finish(whole.run())
    assert lost.job.show()["Restarts"] == "1"  # not 2: the old process requeues no job that is no longer its own


@pytest.mark.slow
def test_a_job_goes_on_when_another_node_falls_silent(cluster: Cluster, folder: Path, whole: Whole) -> None:
    silent = submit(cluster, folder, "silent", "--nodes=2")
    silent.wait_for_rounds()
    with cluster.losing(OTHER[silent.job.show()["BatchHost"]]):
        wait_until(lambda: silent.job.show()["Restarts"] == "1" or silent.job.state in ENDED, 300, "the requeueing")
    silent.finish(whole.run())
    assert silent.job.show()["Restarts"] == "1"
    assert "a node of job" in silent.job.read_log()


def test_a_preempted_job_goes_on(cluster: Cluster, folder: Path, whole: Whole) -> None:
    preempted = submit(cluster, folder, "preempted", "--nodes=2")
    preempted.wait_for_rounds()
    cluster.run("sbatch", "--partition=urgent", "--nodes=1", "--exclusive", "--output=/dev/null", "--wrap=true")
    preempted.finish(whole.run())
    assert preempted.job.show()["Restarts"] == "1"
    assert "this job is preempted" in preempted.job.read_log()


def test_requeued_tasks_of_a_sweep_s_array_go_on(cluster: Cluster, folder: Path, whole: Whole) -> None:
    number, log = call_submit(cluster, folder, "sweep.yaml", "--nodes=2")
    cells = [
        Submitted(
            Job(f"{number}_{i}", log, cluster), folder / "cells" / name
        )  # a task's own number comes with its start
        for i, name in enumerate(CELLS)
    ]
    cells[0].wait_for_rounds()
    cluster.run("scontrol", "requeue", cells[0].job.number)
    cells[1].wait_for_rounds()
    # The last task, which bears the array's own number, has to requeue itself, and itself alone.
    assert cells[1].job.show()["JobId"] == number
    cluster.run("scancel", "--signal=USR2", cells[1].job.number)
    for i, cell in enumerate(cells):
        cell.finish(whole.run(i))
        assert json.loads((cell.run / "summary.json").read_text())["world_size"] == 2
    assert [cell.job.show()["Restarts"] for cell in cells] == ["1", "1"]
    again = cluster.run(sys.executable, str(SUBMIT), "sweep.yaml", cwd=folder)
    assert again == "nothing to submit: 2 complete in cells\n"


@pytest.mark.slow
def test_a_job_at_its_time_limit_goes_on(cluster: Cluster, folder: Path, whole: Whole) -> None:
    limited = submit(cluster, folder, "limited", "--time=1", f"--signal-delay={SIGNAL_DELAY}")
    limited.hold_until_warned()
    limited.finish(whole.run())
    assert int(limited.job.show()["Restarts"]) >= 1
    assert "this job is timed-out" in limited.job.read_log()


def test_a_cancelled_job_is_not_requeued(cluster: Cluster, folder: Path) -> None:
    cancelled = submit(cluster, folder, "cancelled")
    cancelled.wait_for_rounds()
    cluster.run("scancel", str(cancelled.job.number))
    assert cancelled.job.wait() == "CANCELLED"
    assert cancelled.job.show()["Restarts"] == "0"
    wait_until(lambda: "submit it again to go on" in cancelled.job.read_log(), 60, "its last words")
    assert RunDirectory(cancelled.run).read_state()["state"] == INTERRUPTED
