"""A real Slurm of two nodes on this machine, which runs as long as the tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedpeft_dist.tracking.run_directory import COMPLETE, RunDirectory, read_metrics
from tests.warm_process import run_fedpeft

SCRIPTS = Path(__file__).parents[2] / "slurm"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "FEDPEFT"))},
    "FEDPEFT_VENV": sys.prefix,
    "OMP_NUM_THREADS": "1",
    "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
}


def run_plainly(folder: Path, *arguments: str) -> str:
    """Runs a command of fedpeft in a process of its own, without Slurm; returns its output."""
    done = run_fedpeft(folder, *arguments)
    assert done.returncode == 0, done
    return done.stdout


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)


def processes(**variables: str) -> list[int]:
    """The processes of fedpeft that have these variables in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            computes = "fedpeft_dist" in words[1:3] or "submitit.core._submit" in words[1:4]
            if computes and {f"{name}={value}" for name, value in variables.items()} <= set(environment):
                found.append(int(process.name))
    return found


def parent_of(process: int) -> int:
    return int(re.search(r"PPid:\s*(\d+)", Path(f"/proc/{process}/status").read_text())[1])


@dataclass(frozen=True)
class Job:
    number: int
    log: Path
    cluster: Cluster

    def show(self) -> dict[str, str]:
        """Slurm's record of the job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.cluster.run("scontrol", "show", "job", str(self.number))))

    @property
    def state(self) -> str:
        return self.show()["JobState"]

    def wait(self, seconds: float = 240) -> str:
        """Waits until the job has ended for good; returns its last state."""
        wait_until(lambda: self.state in ENDED, seconds, f"the end of a job, whose log says:\n{self.read_log()}")
        return self.state

    def tasks(self) -> list[int]:
        """The processes of all attempts of the job that compute for it."""
        return processes(SLURM_JOB_ID=str(self.number))

    def send(self, number: signal.Signals, tasks: list[int]) -> None:
        for task in tasks:
            with suppress(ProcessLookupError):
                os.kill(task, number)

    def read_log(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""


@dataclass(frozen=True)
class Cluster:
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**ENVIRONMENT, "FEDPEFT_CLUSTER": str(self.folder), "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        environment = {**self.environment, **variables}
        finished = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
        assert finished.returncode == 0, f"{command}: {finished.stderr}"
        return finished.stdout

    def submit(self, script: str, *arguments: str, cwd: Path, options: str = "", **variables: str) -> Job:
        """Submits a script in slurm/ from a folder, with options of sbatch; returns its job."""
        command = ["sbatch", "--parsable", f"--output={cwd}/%j.log", *options.split(), str(SCRIPTS / script)]
        number = int(self.run(*command, *arguments, cwd=cwd, **variables))
        return Job(number, cwd / f"{number}.log", self)

    def states(self) -> dict[int, str]:
        """The states of all jobs that Slurm remembers; each task of an array counts for itself."""
        rows = self.run("squeue", "--noheader", "--array", "--states=all", "--format=%A %T").splitlines()
        return {int(number): state for number, state in map(str.split, rows)}

    def stop_daemon(self, node: str) -> None:
        os.kill(int((self.folder / f"{node}.pid").read_text()), signal.SIGKILL)

    def start_daemon(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    @contextmanager
    def losing(self, node: str) -> Iterator[None]:
        """Silences the node, as if its power or its network were gone; it comes back empty in the end.

        Meanwhile the controller notices as slowly as with Slurm's defaults.
        """
        config, timeout = self.folder / "slurm.conf", "\nSlurmdTimeout={}\n".format
        quick = config.read_text()
        config.write_text(quick.replace(timeout(6), timeout(300)))
        self.run("scontrol", "reconfigure")
        daemon = int((self.folder / f"{node}.pid").read_text())
        silent = [daemon, *(process for task in processes(SLURMD_NODENAME=node) for process in (parent_of(task), task))]
        for process in silent:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in silent:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            config.write_text(quick)
            self.start_daemon(node)
            self.run("scontrol", "reconfigure")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [name for name in ("munged", "slurmctld", "slurmd") if not shutil.which(name, path=ENVIRONMENT["PATH"])]
    if missing:
        pytest.skip(f"no {missing[0]} here; apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    script = str(SCRIPTS / "local_cluster.sh")
    cluster.run(script, "start")
    try:
        yield cluster
    finally:
        cluster.run(script, "stop")


def weights(run: Path) -> str:
    return json.loads((run / "summary.json").read_text())["weights_sha256"]


def rounds(run: Path) -> list[int]:
    file = RunDirectory(run).metrics_file
    return [row["round"] for row in read_metrics(file)] if file.exists() else []


def assert_same_run(run: Path, reference: Path) -> None:
    """Complete, every round told once, and the same result to the bit."""
    assert RunDirectory(run).read_state()["state"] == COMPLETE
    assert rounds(run) == rounds(reference)
    assert weights(run) == weights(reference)
