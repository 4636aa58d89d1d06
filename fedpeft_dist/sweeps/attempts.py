"""A cell of a sweep in a process of its own, observed from outside: where it runs, how far it is, and why it ended.

PyTorch is not asked for the GPUs, because it would open them in a process that only looks after others.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedpeft_dist.sweeps.expansion import Cell
from fedpeft_dist.sweeps.warm_start import WarmServer

TAIL_BYTES = 8192
_NEEDED = {"round", "accuracy", "seconds", "evaluate_seconds"}
_REASON = re.compile(r"error: .*|interrupted; .*|[\w.]+(Error|Exception)\b.*")


@dataclass(frozen=True)
class Place:
    """A worker's share of the machine, where one cell at a time runs."""

    name: str
    environment: Mapping[str, str]
    cpus: frozenset[int] | None = None
    """The CPUs to run on; None leaves the choice to the system."""

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Holds this thread on the place's cores, which processes that are started meanwhile inherit."""
        allowed = os.sched_getaffinity(0) if self.cpus is not None else None
        if allowed is not None:
            os.sched_setaffinity(0, self.cpus)
        try:
            yield
        finally:
            if allowed is not None:
                os.sched_setaffinity(0, allowed)


def find_places(cells: Sequence[Cell], num_workers: int | None, cores: int | None) -> list[Place]:
    """A place for each worker, on a GPU or on cores of its own.

    Args:
        num_workers: None takes as many as there are GPUs, or as the cores suffice for. More workers share the GPUs.
        cores: the cores of a worker; None takes as many as the cells have threads.
    """
    pin = num_workers is None or cores is not None  # a mere number of workers may leave cores free on purpose
    cores = cores or max(cell.config.runtime.threads for cell in cells)
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}
    gpus = [] if all(cell.config.runtime.device == "cpu" for cell in cells) else find_gpus()
    if gpus:
        numbers = [i % len(gpus) for i in range(num_workers or len(gpus))]

        def own(i: int) -> dict[str, str]:  # find_launch reads the number of sharers
            return {**threads, "CUDA_VISIBLE_DEVICES": gpus[i], "FEDPEFT_GPU_SHARERS": str(numbers.count(i))}

        return [Place(f"gpu {i}", own(i)) for i in numbers]
    can_pin = hasattr(os, "sched_setaffinity")
    cpus = sorted(os.sched_getaffinity(0)) if can_pin else range(os.cpu_count() or 1)
    num_workers = num_workers or max(1, len(cpus) // cores)
    if not (can_pin and pin and num_workers * cores <= len(cpus)):
        return [Place(f"worker {i}", threads) for i in range(num_workers)]
    shares = [cpus[i * cores : (i + 1) * cores] for i in range(num_workers)]
    return [Place("cpu " + ",".join(map(str, share)), threads, frozenset(share)) for share in shares]


def find_gpus() -> list[str]:
    """The name in CUDA_VISIBLE_DEVICES of each GPU that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        ends = (i for i, name in enumerate(names) if name in ("", "-1"))  # CUDA ignores the names after these
        return names[: next(ends, len(names))]
    with suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
        # UUIDs, because nvidia-smi and CUDA may number GPUs differently. A split GPU is replaced by its parts.
        return re.findall(r"\(UUID: (MIG-[^)]+|GPU-[^)]+(?!\)\n\s+MIG))\)", listed)
    return []


@dataclass(eq=False)
class Task:
    """A cell and its fate."""

    sweep: Path
    cell: Cell
    name: str
    state: str
    failures: int = 0
    reason: str = ""
    """Why the last attempt failed."""

    @property
    def log(self) -> Path:
        """A file beside the run's own. It begins no run: only a state.json does."""
        return self.cell.directory.path / "log.txt"


class Attempt:
    """A cell's process. Its start raises OSError if its log cannot be written."""

    def __init__(self, task: Task, place: Place, overrides: Sequence[str], server: WarmServer):
        self.task, self.place, self.rounds = task, place, task.cell.config.federation.rounds
        self.look()
        self.rounds_before = self.rounds_done
        self.started = time.monotonic()
        cell = ["--index", str(task.cell.index), "--name", task.cell.name]  # the file may be edited meanwhile
        arguments = ["sweep", "run", str(task.sweep), *cell, *overrides]
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with open(task.log, "ab") as log:
            log.write(f"$ python -m fedpeft_dist {' '.join(arguments)}\n".encode())
            log.flush()
            self.log_start = log.tell()
        with place.pinned():
            self.process = server.start(arguments, place.environment, task.log)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def look(self) -> None:
        """Reads the last rows of the run's metrics; damaged and unfinished lines are left out."""
        self.rows: list[dict[str, Any]] = []
        with suppress(OSError), open(self.task.cell.directory.metrics_file, "rb") as file:
            file.seek(-min(TAIL_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
            for line in file.read().splitlines():
                with suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict) and row.keys() >= _NEEDED:
                        self.rows.append(row)
        self.rounds_done = self.rows[-1]["round"] if self.rows else 0

    @property
    def accuracy(self) -> str:
        """The last measured accuracy."""
        return next((f"{row['accuracy']:.4f}" for row in reversed(self.rows) if row["accuracy"] is not None), "?")

    def seconds_left(self) -> float | None:
        """An estimate from the speed of the last rounds; None before the first one is done."""
        if self.rounds_done <= self.rounds_before:
            return None
        per_round = fmean(row["seconds"] + row["evaluate_seconds"] for row in self.rows)
        return per_round * (self.rounds - self.rounds_done)

    def reason(self, code: int) -> str:
        """Why the process ended with this code, from its last output."""
        if code < 0:
            likely = "; was the memory too small?" if -code == signal.SIGKILL else ""
            return f"killed by signal {-code} ({signal.strsignal(-code)}){likely}"
        if code == 0:
            return "its process ended well, but its run is not complete; was the sweep's file changed meanwhile?"
        said = self.task.log.read_bytes()[self.log_start :].decode(errors="replace").splitlines()
        reasons = (line.removeprefix("error: ") for line in reversed(said) if _REASON.match(line))
        return next(reasons, f"exit code {code}")
