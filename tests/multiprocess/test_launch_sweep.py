"""launch/sweep.py: a machine's workers, on real cells in real processes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft_dist.tracking.run_directory import COMPLETE, FAILED, INTERRUPTED, RunDirectory
from tests.multiprocess.test_sweep_workers import BASE
from tests.warm_process import WarmProcess, fedpeft

SCRIPT = Path(__file__).parents[2] / "launch" / "sweep.py"
TWO_WORKERS = ("--workers", "2", "--cores-per-worker", "1")
ROUNDS = 60
"""Enough rounds for a signal to arrive in one."""


@pytest.fixture
def make_sweep(tmp_path: Path) -> Callable[..., Path]:
    def make(**cells: dict[str, Any]) -> Path:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE), encoding="utf-8")
        path = tmp_path / "sweep.yaml"
        tree = {"base": "base.yaml", "output": "out", "cells": cells}
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        return path

    return make


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a command in a process group of its own, as a shell would, and kills what a failed test leaves of it."""
    started = []

    def start_one(*command: str | Path, **options: Any) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, command)]
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **pipes))
        return started[-1]

    yield start_one
    for process in started:
        for pid in [*children(process), process.pid] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        with process:
            pass


def children(process: subprocess.Popen) -> list[int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    return [pid for pid, parent in pairs if parent == process.pid]


def cells_of(process: subprocess.Popen) -> dict[int, str]:
    """The name of each cell's process. The other child is the one that cells are forked off."""
    found = {}
    for pid in children(process):
        with suppress(OSError):  # it has ended
            found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
    return {pid: name for pid, name in found.items() if name.startswith("cell ")}


def wait_until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 300
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def run_of(sweep: Path, name: str) -> RunDirectory:
    return RunDirectory(sweep.parent / "out" / f"{name}-seed1")


def state_of(sweep: Path, name: str) -> str | None:
    state = run_of(sweep, name).read_state()
    return None if state is None else state["state"]


def log_of(sweep: Path, name: str) -> str:
    return (run_of(sweep, name).path / "log.txt").read_text(encoding="utf-8")


def digest(run: Path) -> str:
    return json.loads((run / "summary.json").read_text())["weights_sha256"]


def test_a_failed_cell_stops_no_other_and_a_killed_one_is_retried(make_sweep: Callable, start: Callable) -> None:
    long, impossible = {"federation.rounds": ROUNDS}, {"data.clients": 5000}
    sweep = make_sweep(killed=long, impossible=impossible, quick={"client.optimizer.lr": 0.1})
    runner = start(SCRIPT, sweep, *TWO_WORKERS)
    killed = run_of(sweep, "killed")
    wait_until(lambda: killed.metrics_file.exists() and killed.metrics_file.read_bytes().count(b"\n") > 1)
    (pid,) = [pid for pid, name in cells_of(runner).items() if name == "cell 0"]
    os.kill(pid, signal.SIGKILL)
    keys = (f"federation.rounds={ROUNDS}", "output.root=alone", "output.name=run")
    train = WarmProcess(fedpeft, sweep.parent, ["train", "base.yaml", *keys])
    output, _ = runner.communicate(timeout=300)
    assert runner.returncode == 1
    *told, failure, last = output.splitlines()
    assert told[0] == "3 cells: 3 waiting; workers: 2"
    assert (
        "to be tried again: killed-seed1: killed by signal 9 (Killed); was the memory too small? (log: out/" in output
    )
    assert re.search(r"\ncomplete quick-seed1, accuracy 0\.\d{4}, 0:00:\d\d; ", output)
    reason = "impossible-seed1: data.clients: 5000 is more than the 512 training samples"
    assert failure == f"failed: {reason} (log: out/impossible-seed1/log.txt)"
    assert re.fullmatch(
        r"2 complete, 0 skipped, 1 failed in \d+ s, workers: 2; to compare them: fedpeft report out", last
    )
    assert [log_of(sweep, name).count("$ python") for name in ("killed", "impossible", "quick")] == [2, 1, 1]
    assert "going on after round" in log_of(sweep, "killed")
    assert [state_of(sweep, name) for name in ("killed", "impossible", "quick")] == [COMPLETE, FAILED, COMPLETE]
    assert train.finish().returncode == 0
    assert digest(killed.path) == digest(sweep.parent / "alone" / "run")

    # A complete cell starts no process, and the launcher imports no torch.
    command = f"sys.argv = ['sweep.py', {str(sweep)!r}]; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    probe = f"import runpy, sys\ntry: {command}\nfinally: print(sorted({{'torch', 'timm'}} & set(sys.modules)))"
    again = start("-c", probe)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 1
    assert output.splitlines()[0].startswith("3 cells: 2 complete, 1 waiting; workers: ")
    assert output.splitlines()[-2].startswith("0 complete, 2 skipped, 1 failed in ")
    assert output.splitlines()[-1] == "[]"
    assert log_of(sweep, "quick").count("$ python") == 1


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(make_sweep: Callable, start: Callable) -> None:
    sweep = make_sweep(**{name: {"federation.rounds": ROUNDS} for name in ("one", "two", "three")})
    main, terminal = pty.openpty()
    runner = start(SCRIPT, sweep, *TWO_WORKERS, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown: list[bytes] = []
    reader = threading.Thread(target=read_terminal, args=(main, shown))
    reader.start()
    cells = wait_until(lambda: len(found := cells_of(runner)) == 2 and found)
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1:
        first, second = (os.sched_getaffinity(pid) for pid in cells)
        assert len(first) == len(second) == 1
        assert first != second
    wait_until(lambda: re.search(rf" \d+/{ROUNDS} +0\.\d{{4}} +0:00:\d\d ".encode(), b"".join(shown)))
    os.killpg(runner.pid, signal.SIGINT)
    assert runner.wait(timeout=120) == 75
    reader.join()
    assert not any(Path(f"/proc/{pid}").exists() for pid in cells)
    text = b"".join(shown).decode()
    assert "2 running, 1 waiting" in text
    assert "stopping: the running cells write a checkpoint" in text
    assert "interrupted; run the same command to go on" in text
    states = [state_of(sweep, name) for name in ("one", "two", "three")]
    assert INTERRUPTED in states[:2]
    assert set(states) <= {INTERRUPTED, None}  # the second may not have begun
    assert states[2] is None

    runner = start(SCRIPT, sweep, *TWO_WORKERS)
    output, _ = runner.communicate(timeout=300)
    assert runner.returncode == 0, output
    assert {state_of(sweep, name) for name in ("one", "two", "three")} == {COMPLETE}
    assert "going on after round" in log_of(sweep, "one") + log_of(sweep, "two")


def read_terminal(main: int, shown: list[bytes]) -> None:
    try:
        while data := os.read(main, 65536):
            shown.append(data)
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        os.close(main)


def test_a_sweep_that_is_edited_meanwhile_runs_no_cell_in_anothers_place(make_sweep: Callable, start: Callable) -> None:
    sweep = make_sweep(one={"federation.rounds": ROUNDS}, two={})
    runner = start(SCRIPT, sweep, "--workers", "1")
    wait_until(run_of(sweep, "one").config_file.exists)
    make_sweep(zero={}, one={"federation.rounds": ROUNDS}, two={})
    output, _ = runner.communicate(timeout=120)
    assert runner.returncode == 1, output
    assert "has changed: cell 1 is called one-seed1 now, not two-seed1; start again" in output
    assert [state_of(sweep, name) for name in ("zero", "one", "two")] == [None, COMPLETE, FAILED]


def test_a_cell_in_work_elsewhere_is_left_alone_and_looked_at_again(make_sweep: Callable, start: Callable) -> None:
    sweep = make_sweep(endless={"federation.rounds": 100000}, quick={})
    other = WarmProcess(fedpeft, sweep.parent, ["sweep", "run", str(sweep), "--index", "0"])
    endless = run_of(sweep, "endless")
    wait_until(endless.metrics_file.exists)
    told = sweep.parent / "told"
    with open(told, "w") as output:
        runner = start(SCRIPT, sweep, "--workers", "1", stdout=output)
    wait_until(lambda: state_of(sweep, "quick") == COMPLETE)
    assert not (endless.path / "log.txt").exists()
    other.kill()
    wait_until(lambda: (endless.path / "log.txt").exists() and "going on after round" in log_of(sweep, "endless"))

    # A second Ctrl-C does not wait: not even for a process that cannot hear the first. A key held down sends many.
    (cell,) = cells_of(runner)
    os.kill(cell, signal.SIGSTOP)
    os.killpg(runner.pid, signal.SIGINT)
    wait_until(lambda: "stopping" in told.read_text())
    assert runner.poll() is None
    for _ in range(30):
        if runner.poll() is None:
            os.killpg(runner.pid, signal.SIGINT)
            time.sleep(0.02)
    assert runner.wait(timeout=60) == 75, told.read_text()
    assert not endless.in_use()
    assert "left alone endless-seed1, another process is at it\n" in told.read_text()
    assert "\nkilled\n" in told.read_text()
    assert "1 complete, 0 skipped, 0 failed in " in told.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.yaml",), "none.yaml: no such config file"),
        (("federation.rounds=3",), "SWEEP: missing; give a sweep's YAML file"),
        (("sweep.yaml", "federation.round=3"), "did you mean federation.rounds"),
        (("sweep.yaml", "--workers", "0"), "--workers"),
    ],
    ids=str,
)
def test_a_mistake_is_told_in_one_line(
    make_sweep: Callable, start: Callable, arguments: tuple[str, ...], message: str
) -> None:
    make_sweep(a={})
    runner = start(SCRIPT, *arguments)
    output, _ = runner.communicate(timeout=60)
    assert runner.returncode == 2
    assert output.startswith("error: ")
    assert message in output
    assert output.count("\n") == 1
