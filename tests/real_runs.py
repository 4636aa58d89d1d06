"""Runs in processes of their own, on one rank or more: how tests start and watch them, and judge what they left."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedpeft_dist.config.trees import merge_trees
from fedpeft_dist.tracking.run_directory import COMPLETE, RunDirectory
from tests.multiprocess import faulty_worker
from tests.multiprocess.exactness_worker import ALGORITHMS, METHODS, make_config
from tests.warm_process import WarmProcess, WarmRanks, fedpeft, variables_of_ranks

ROUNDS = 40
TRACE = "fedpeft_dist/federation"
"""Stands in every traceback of ours; torchrun prints others, of its own."""
PATIENCE = 300
"""Seconds that a process may take on a busy machine."""
LATE_SIGNALS = """
import os, signal

class Late:
    def __del__(self, os=os, numbers=(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)):
        os.write(2, b"late signals\\n")
        for number in numbers:
            os.kill(os.getpid(), number)

late = Late()
"""
"""The text of a sitecustomize.py in a folder on PYTHONPATH. The process then gets these signals after its interpreter
has taken down the handlers that are written in Python, and before it frees what modules hold."""
_TOKEN = "FEDPEFT_TEST_TOKEN"
_numbers = itertools.count()


def write_config(
    folder: Path,
    name: str,
    rounds: int = ROUNDS,
    method: str = "prompt",
    algorithm: str | None = None,
    sharding: int = 1,
    **output: Any,
) -> Path:
    """Ragged clients on lanes, dropout, and a server optimizer with state; the run is `folder / name`.

    `sharding` is the number of ranks that share frozen weights.
    """
    tree = merge_trees(make_config(METHODS[method], folder, name), ALGORITHMS.get(algorithm, {}))
    tree["federation"] |= {"rounds": rounds}
    tree["server"] = {"optimizer": {"name": "yogi"}}
    tree["output"] |= output
    tree["runtime"] |= {"sharding": {"size": sharding}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


class Launched:
    """A command that is running.

    Its processes carry a token in their environment, so that they are found also when their parent is gone.
    """

    def __init__(self, command: list[str], folder: Path, environment: Mapping[str, str]):
        self.token = f"{os.getpid()}-{next(_numbers)}"
        self.started = time.monotonic()
        variables = os.environ | {"OMP_NUM_THREADS": "1", _TOKEN: self.token} | environment
        # A file, and no pipe: nobody has to read it while processes come and go.
        with tempfile.NamedTemporaryFile() as log:
            self._log = open(log.name)  # noqa: SIM115, it lives as long as this object
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=hear_signals,
            )

    @property
    def output(self) -> str:
        self._log.seek(0)
        return self._log.read()

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def processes(self) -> dict[int, dict[str, str]]:
        """The environment of each process that is left, by its number."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                entries = path.read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue  # it has ended, or is somebody else's
            variables = dict(entry.split("=", 1) for entry in entries if "=" in entry)
            if variables.get(_TOKEN) == self.token:
                found[int(path.parent.name)] = variables
        return found

    def ranks(self) -> dict[int, int]:
        """The process of each rank that torchrun has started and that is left."""
        return {int(variables["RANK"]): pid for pid, variables in self.processes().items() if "RANK" in variables}

    def wait(self, timeout: float = PATIENCE) -> int:
        """Waits until the command and all that it has started are gone; returns its exit code."""
        deadline = time.monotonic() + timeout
        code = self.process.wait(timeout)
        wait_until(lambda: not self.processes(), timeout=deadline - time.monotonic())
        return code

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """All that is left of it."""
        while found := self.processes():
            for pid in found:
                send(pid, signal.SIGKILL)
        self.process.wait()


def hear_signals() -> None:
    """For a child: a shell lets its background ignore SIGINT, and nohup SIGHUP, and so the children of the tests."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def send(pid: int, number: signal.Signals) -> bool:
    """Whether the process was still there to get the signal."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def start(config: Path, ranks: int = 1, max_restarts: int = 0, faulty: bool = False, **environment: str) -> Launched:
    """Starts a config, under torchrun if it has several ranks; `faulty` plants the fault that FAULT names."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--max-restarts={max_restarts}"]
    launcher = [*launcher, f"--nproc-per-node={ranks}"] * (ranks > 1)
    program = [faulty_worker.__file__] if faulty else ["-m", "fedpeft_dist"]
    return Launched([sys.executable, *launcher, *program, "train", str(config)], config.parent, environment)


def start_without_agent(config: Path, ranks: int = 2, faulty: bool = False, **environment: str) -> list[WarmProcess]:
    """A process a rank, as srun starts them: nobody ends the others when one is gone."""
    main, arguments = faulty_worker.main if faulty else fedpeft, ["train", str(config)]
    return [
        WarmProcess(main, config.parent, arguments, environment | variables) for variables in variables_of_ranks(ranks)
    ]


def wait_until(condition: Callable[[], object], timeout: float = PATIENCE) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def start_warm(config: Path, ranks: int = 1) -> WarmRanks:
    """Where neither the launcher nor the start of a process is under test."""
    return WarmRanks(ranks, config.parent, "train", str(config))


def wait_for_rounds(launched: Launched | WarmRanks, run: RunDirectory, count: int) -> None:
    def are_done() -> bool:
        assert launched.is_running, launched.output
        return rounds_logged(run) >= count

    wait_until(are_done)


def rounds_logged(run: RunDirectory) -> int:
    return run.metrics_file.read_text().count("\n") if run.metrics_file.exists() else 0


def complete(config: Path, ranks: int = 1) -> str:
    """Runs a config to its end; returns what it printed."""
    with start_warm(config, ranks) as warm:
        assert [done.returncode for done in warm.finish(PATIENCE)] == [0] * ranks, warm.output
        return warm.output


def run_of(config: Path) -> RunDirectory:
    return RunDirectory(config.with_suffix(""))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run that nobody disturbs."""
    config = write_config(tmp_path_factory.mktemp("whole"), "whole")
    complete(config)
    return run_of(config)


def differences(run: RunDirectory, whole: RunDirectory) -> list[str]:
    """The differences of a run from one that nobody disturbed; empty if all that counts is the same."""
    state = run.read_state()
    if state is None or state["state"] != COMPLETE:
        return [f"state {state}"]
    found = []
    summary, expected = (json.loads(r.summary_file.read_text()) for r in (run, whole))
    for key in ("weights_sha256", "final_accuracy", "best_accuracy", "uplink_bytes_total", "rejected_total"):
        if summary[key] != expected[key]:
            found.append(f"{key} {summary[key]}, not {expected[key]}")
    for key in ("round", "train_loss", "accuracy"):
        values, wanted = ([row[key] for row in _rows(r)] for r in (run, whole))
        if values != wanted:
            found.append(f"metrics.jsonl: {key} {values}, not {wanted}")
    scalars, expected = _scalars(run), _scalars(whole)
    for tag, points in expected.items():
        steps, wanted = ([step for step, _ in p] for p in (scalars.get(tag, []), points))
        if steps != wanted:
            found.append(f"TensorBoard: {tag} at rounds {steps}")
    for tag in ("train_loss", "accuracy"):
        if scalars.get(tag) != expected[tag]:
            found.append(f"TensorBoard: {tag} {scalars.get(tag)}, not {expected[tag]}")
    if _files(run) != _files(whole):
        found.append(f"files {sorted(_files(run) ^ _files(whole))}")
    if run.in_use():
        found.append("the lock is held")
    return found


def _rows(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]


def _scalars(run: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    """Each tag's (step, value), as TensorBoard shows them."""
    board = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def _files(run: RunDirectory) -> set[str]:
    """The run's files, without checkpoints and event files, which depend on when the run was stopped."""
    names = {str(path.relative_to(run.path)) for path in run.path.rglob("*")}
    return {name for name in names if not re.fullmatch(r"checkpoints/round-\d+\.\w+|tensorboard/events[^/]*", name)}
