"""A cell of a sweep in a process of its own, observed from outside: how far it is, and why it ended."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedpeft_dist.sweeps.expansion import Cell
from fedpeft_dist.sweeps.places import Place

TAIL_BYTES = 8192
_NEEDED = {"round", "accuracy", "seconds", "evaluate_seconds"}
_REASON = re.compile(r"error: .*|interrupted; .*|[\w.]+(Error|Exception)\b.*")


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
    """A cell's process.

    Raises:
        OSError: its log cannot be written.
    """

    def __init__(self, task: Task, place: Place, overrides: Sequence[str]):
        self.task, self.place = task, place
        self.look()
        self.rounds_before = self.rounds_done
        self.started = time.monotonic()
        arguments = ["-m", "fedpeft_dist", "sweep", "run", str(task.sweep), "--index", str(task.cell.index), *overrides]
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with open(task.log, "ab") as log, place.starting_here():
            log.write(f"$ python {' '.join(arguments)}\n".encode())
            log.flush()
            self.log_start = log.tell()
            # A session of its own, because a terminal sends Ctrl-C to all foreground processes. The launcher decides
            # which cells stop.
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **place.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def rounds_done(self) -> int:
        return self.rows[-1]["round"] if self.rows else 0

    @property
    def rounds(self) -> int:
        return self.task.cell.config.federation.rounds

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

    @property
    def accuracy(self) -> str:
        """The last measured accuracy."""
        found = [row["accuracy"] for row in self.rows if row["accuracy"] is not None]
        return f"{found[-1]:.4f}" if found else "?"

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
        reasons = [line for line in said if _REASON.match(line)]
        return reasons[-1].removeprefix("error: ") if reasons else f"exit code {code}"
