"""Contestants are processes that take turns on one machine, so that all of them meet the same conditions.

A contestant builds what it needs, says `ready`, and then trains as many rounds as each line on its standard input asks
for. Between its turns it waits and uses no CPU. A contestant may have several ranks, which all get the same lines.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).parent
PACKAGE = str(HERE.parent)


@dataclass
class Contestant:
    """A program of this folder, its one argument as JSON, and the processes that run it."""

    program: str
    argument: Any
    threads: int = 1
    ranks: int = 1
    python: str = sys.executable
    variables: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> Contestant:
        """Starts the processes; `ready` waits for them."""
        shared = {"OMP_NUM_THREADS": str(self.threads), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        folders = [PACKAGE, str(HERE), str((HERE / self.program).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        path = os.pathsep.join(folders)
        environment = {**os.environ, **shared, "PYTHONPATH": path, **self.variables}
        self.processes = []
        for rank in range(self.ranks):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks}
            numbers = {name: str(value) for name, value in own.items()} if self.ranks > 1 else {}
            self.processes.append(
                subprocess.Popen(
                    [self.python, str(HERE / self.program), json.dumps(self.argument)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment | numbers,
                )
            )
        return self

    def ready(self) -> dict[str, Any]:
        """What the contestant tells of itself once it is built."""
        return self._answers()[0]

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()

    def ask(self, **command: Any) -> dict[str, Any]:
        """The ranks' answer: the seconds of the slowest and the samples of all."""
        for process in self.processes:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        answers = self._answers()
        seconds, samples = zip(*[(answer["seconds"], answer["samples"]) for answer in answers])
        return {"seconds": max(seconds), "samples": sum(samples)}

    def _answers(self) -> list[dict[str, Any]]:
        lines = [process.stdout.readline() for process in self.processes]
        if not all(lines):
            raise SystemExit(f"{self.program} has ended before its answer; its message is above")
        return [json.loads(line) for line in lines]


def race(contestants: Mapping[str, Contestant], turns: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Samples per second of each contestant in each turn, by name, and what else it has told.

    Args:
        seconds: the least length of a turn; a contestant trains as many rounds as fit.
    """
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    with ExitStack() as stack:
        for contestant in contestants.values():
            stack.enter_context(contestant)
        facts = {name: contestant.ready() for name, contestant in contestants.items()}
        rounds = {name: _rounds_for(seconds, contestant) for name, contestant in contestants.items()}
        names = list(contestants)
        for turn in range(turns):
            first = turn % len(names)  # nobody always follows the same neighbour's heat
            for name in names[first:] + names[:first]:
                answer = contestants[name].ask(rounds=rounds[name])
                speeds[name].append(answer["samples"] / answer["seconds"])
    return {
        name: {"samples_per_second": statistics.median(speeds[name]), "turns": speeds[name], **facts[name]}
        for name in contestants
    }


def ratio(results: Mapping[str, dict[str, Any]], name: str, other: str) -> float:
    """The median over the turns of one contestant's speed over another's."""
    return statistics.median(a / b for a, b in zip(results[name]["turns"], results[other]["turns"]))


def fastest(results: Mapping[str, dict[str, Any]], names: list[str]) -> str:
    return max(names, key=lambda name: results[name]["samples_per_second"])


def claim_output() -> TextIO:
    """This process's standard output, for answers alone. What libraries print goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(
    answers: TextIO, rounds: Callable[[int], int], save: Callable[[str], None] | None = None, **facts: Any
) -> None:
    """The contestant's side: answers commands until its standard input ends.

    Args:
        rounds: trains so many rounds and returns the samples that this process has gone through.
        save: writes the global tensors into a file.
        facts: what else the contestant tells of itself.
    """

    def answer(what: Mapping[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    answer(facts)
    for line in sys.stdin:
        command, started = json.loads(line), time.perf_counter()
        samples = rounds(command["rounds"])
        seconds = time.perf_counter() - started
        if "save" in command:
            save(command["save"])
        answer({"samples": samples, "seconds": seconds})


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def machine() -> dict[str, Any]:
    """What a figure depends on: the processor, its cores, and PyTorch's version."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"processor": model, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}


def _rounds_for(seconds: float, contestant: Contestant) -> int:
    contestant.ask(rounds=1)  # allocates and, perhaps, compiles
    contestant.ask(rounds=1)
    return max(1, round(seconds / contestant.ask(rounds=1)["seconds"] + 0.5))
