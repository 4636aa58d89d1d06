"""Works through sweeps on one machine: a worker on each GPU, or on every few cores if there are no GPUs.

    python launch/sweep.py SWEEP [SWEEP ...] [key=value ...] [--workers N] [--cores-per-worker K] [--retries N]

The cells of all given sweeps form one queue. A run's config counts as a sweep of one cell. Each cell runs in a process
of its own (`fedpeft sweep run SWEEP --index I --name NAME`), so a cell that crashes or runs out of memory disturbs no
other. The processes are forked off one that has imported everything. The output of a cell is appended to `log.txt` in
its run's directory. A live table shows the progress on a terminal; on a pipe, plain lines do.

Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal (SIGHUP) stop cleanly: the running cells write a checkpoint, no new cell
is started, and the same command goes on later. Under nohup, a closed terminal stops nothing. A second Ctrl-C kills the
cells. If this process is killed, its running cells go on to their end, and their locks keep other workers away.

Exit codes: 0 all cells are complete; 1 some failed; 2 the user's mistake; 75 interrupted.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.runtime.command import EXIT_MISTAKE, leave_interrupted, run_app, user_path
from fedpeft_dist.runtime.interrupts import StopRequest, listen_for_stop
from fedpeft_dist.sweeps.attempts import Attempt, Place, Task, find_places
from fedpeft_dist.sweeps.expansion import Cell, load_cells
from fedpeft_dist.sweeps.warm_start import WarmServer
from fedpeft_dist.sweeps.workers import cell_state, record_failure
from fedpeft_dist.tracking.run_directory import COMPLETE, FAILED, RUNNING

WAITING, SKIPPED, ELSEWHERE = "waiting", "skipped", "in work elsewhere"
LOOK_SECONDS = 0.1
STATUS_SECONDS = 60.0
"""Seconds between two status lines on a pipe."""
TAKEN_SECONDS = 2.0
"""Seconds between two looks at the cells that other workers are running."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__.partition("\n")[0])
def sweep(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="SWEEP ... [KEY=VALUE ...]", help="Sweep files or configs of runs, and keys to override."
        ),
    ],
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many cells run at a time; without it, a GPU or K cores have one.")
    ] = None,
    cores_per_worker: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="CPU cores of a worker; without it, as runtime.threads.")
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="How often a cell that failed is tried again, from its checkpoint.")
    ] = 1,
) -> None:
    overrides = [argument for argument in arguments if "=" in argument]
    sweeps = [user_path(argument) for argument in arguments if "=" not in argument]
    if not sweeps:
        raise ConfigError("SWEEP: missing; give a sweep's YAML file")
    cells = [(path, cell) for path in sweeps for cell in load_cells(path, overrides)]
    folder = Path(os.path.commonpath([cell.directory.path.absolute().parent for _, cell in cells]))
    tasks = [
        Task(path, cell, os.path.relpath(cell.directory.path, folder), SKIPPED if _is_complete(cell) else WAITING)
        for path, cell in cells
    ]
    places = find_places([cell for _, cell in cells], workers, cores_per_worker)
    started = time.monotonic()
    display = Display()
    is_private = any(cell.config.privacy.name != "none" for _, cell in cells)
    server = WarmServer(["fedpeft_dist.privacy.plan"] if is_private else [])
    with listen_for_stop() as stop, display.live, server:
        runner = Runner(tasks, places, overrides, retries, display, server)
        try:
            runner.run(stop)
        except KeyboardInterrupt:
            display.note("killed")

    for task in tasks:
        if task.state == FAILED:
            print(f"failed: {task.name}: {task.reason} (log: {task.log})")
    counts = Counter(task.state for task in tasks)
    print(
        f"{counts[COMPLETE]} complete, {counts[SKIPPED]} skipped, {counts[FAILED]} failed in "
        f"{time.monotonic() - started:.0f} s, workers: {len(places)}; "
        f"to compare them: fedpeft report {min(str(folder), os.path.relpath(folder), key=len)}"
    )
    if counts[COMPLETE] + counts[SKIPPED] + counts[FAILED] < len(tasks):
        leave_interrupted()
    raise SystemExit(1 if counts[FAILED] else 0)


class Runner:
    """Gives the tasks to the places."""

    def __init__(
        self,
        tasks: list[Task],
        places: list[Place],
        overrides: Sequence[str],
        retries: int,
        display: "Display",
        server: WarmServer,
    ):
        self.tasks, self.places, self.overrides, self.retries = tasks, places, overrides, retries
        self.display, self.server = display, server
        self.waiting = [task for task in tasks if task.state == WAITING]
        self.attempts: list[Attempt] = []
        self.idle = list(places)
        self.speeds: list[tuple[float, int]] = []
        """Seconds and rounds of each attempt that ended well."""
        self.stopping = False
        self.looked_at_taken = 0.0

    def run(self, stop: StopRequest) -> None:
        """Works until every task is complete or has failed, or all cells have stopped."""
        self.display.note(f"{len(self.tasks)} cells: {self.status()}; workers: {len(self.places)}")
        try:
            while True:
                for attempt in list(self.attempts):
                    code = attempt.process.poll()
                    attempt.look()
                    if code is not None:
                        self.attempts.remove(attempt)
                        self.idle.append(attempt.place)
                        self.settle(attempt, code)
                if stop.received and not self.stopping:
                    self.stopping = True
                    self.display.note("stopping: the running cells write a checkpoint; Ctrl-C kills them")
                    for attempt in self.attempts:
                        attempt.process.terminate()
                if not self.stopping:
                    self.fill()
                if not self.attempts and (self.stopping or not self.count(WAITING, ELSEWHERE)):
                    return
                self.display.show(self)
                time.sleep(LOOK_SECONDS)
        except BaseException as error:
            number = signal.SIGTERM
            if isinstance(error, KeyboardInterrupt):
                number = signal.SIGKILL
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a key that is held down sends more of them
            for attempt in self.attempts:
                with suppress(ProcessLookupError):  # it has just ended by itself
                    os.killpg(attempt.process.pid, number)
            for attempt in self.attempts:
                attempt.process.wait()
            raise

    def fill(self) -> None:
        """Starts a cell on every idle worker; cells that other workers were running come last."""
        while self.idle and (task := self.next_task()) is not None:
            if _is_complete(task.cell):
                task.state = SKIPPED
            elif _is_taken(task.cell):
                self.leave_alone(task)
            else:
                self.start(task)

    def next_task(self) -> Task | None:
        if not self.waiting and time.monotonic() - self.looked_at_taken > TAKEN_SECONDS:
            self.looked_at_taken = time.monotonic()
            self.waiting = [task for task in self.tasks if task.state == ELSEWHERE]
        return self.waiting.pop(0) if self.waiting else None

    def start(self, task: Task) -> None:
        try:
            attempt = Attempt(task, self.idle[0], self.overrides, self.server)
        except OSError as error:
            self.fail(task, str(error))
            return
        self.attempts.append(attempt)
        self.idle.remove(attempt.place)
        task.state = RUNNING
        self.display.note(f"started {task.name} on {attempt.place.name}")

    def settle(self, attempt: Attempt, code: int) -> None:
        """Updates a task whose process has ended. The state of its run counts for more than the exit code."""
        task = attempt.task
        if _is_complete(task.cell):
            task.state = COMPLETE
            self.speeds.append((attempt.elapsed, attempt.rounds - attempt.rounds_before))
            self.display.note(
                f"complete {task.name}, accuracy {attempt.accuracy}, {_time(attempt.elapsed)}; {self.status()}"
            )
        elif _is_taken(task.cell):
            self.leave_alone(task)
        elif self.stopping and code != EXIT_MISTAKE:
            task.state = WAITING
        else:
            task.failures += 1
            if code == EXIT_MISTAKE or task.failures > self.retries:
                self.fail(task, attempt.reason(code))
                return
            task.state, task.reason = WAITING, attempt.reason(code)
            self.waiting.append(task)  # the cause may have passed when its turn comes again
            self.display.note(f"to be tried again: {task.name}: {task.reason} (log: {task.log})")

    def leave_alone(self, task: Task) -> None:
        if task.state != ELSEWHERE:
            self.display.note(f"left alone {task.name}, another process is at it")
        task.state = ELSEWHERE

    def fail(self, task: Task, reason: str) -> None:
        task.state, task.reason = FAILED, reason
        record_failure(task.cell, reason)
        self.display.note(f"failed {task.name}: {reason} (log: {task.log})")

    def count(self, *states: str) -> int:
        return sum(task.state in states for task in self.tasks)

    def status(self) -> str:
        counts = {
            "complete": self.count(COMPLETE, SKIPPED),
            **{state: self.count(state) for state in (RUNNING, FAILED, ELSEWHERE, WAITING)},
        }
        left = self.seconds_left()
        parts = [f"{count} {state}" for state, count in counts.items() if count]
        return ", ".join(parts) + ("" if left is None else f"; {_time(left)} left")

    def seconds_left(self) -> float | None:
        """An estimate from the mean time of a round, over all attempts with an estimate; None before there is one."""
        speeds, left, unknown = list(self.speeds), [], 0
        for attempt in self.attempts:
            seconds = attempt.seconds_left()
            if seconds is None:
                unknown += attempt.rounds - attempt.rounds_before
            else:
                left.append(seconds)
                speeds.append((attempt.elapsed + seconds, attempt.rounds - attempt.rounds_before))
        if not speeds or self.stopping or not self.count(RUNNING, WAITING):
            return None
        unknown += sum(task.cell.config.federation.rounds for task in self.tasks if task.state == WAITING)
        per_round = sum(seconds for seconds, _ in speeds) / max(1, sum(rounds for _, rounds in speeds))
        return max([(sum(left) + unknown * per_round) / len(self.places), *left])


def _is_complete(cell: Cell) -> bool:
    return cell_state(cell) == COMPLETE


def _is_taken(cell: Cell) -> bool:
    with suppress(OSError, NotImplementedError):  # a run that cannot be locked fails by itself, and says why
        return cell.directory.in_use()
    return False


# --- what is shown -----------------------------------------------------------------------------------------------


class Display:
    """A live table below the notes on a terminal, in the context of `live`; plain lines anywhere else."""

    def __init__(self):
        self.console = Console()
        live = Live(console=self.console, auto_refresh=False, transient=True)
        self.live = live if self.console.is_terminal else nullcontext()
        self.told = time.monotonic()

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, runner: Runner) -> None:
        """Shows the progress."""
        if self.console.is_terminal:
            self.live.update(self.table(runner), refresh=True)
        elif time.monotonic() - self.told > STATUS_SECONDS:
            self.told = time.monotonic()
            self.note(runner.status())

    def table(self, runner: Runner) -> Group:
        """Rows for the running and the failed cells, as many as fit, and counts for the rest."""
        table = Table("cell", "worker", "round", "accuracy", "left", box=None, pad_edge=False, expand=True)
        for attempt in runner.attempts:
            left = attempt.seconds_left()
            table.add_row(
                attempt.task.name,
                attempt.place.name,
                f"{attempt.rounds_done}/{attempt.rounds}",
                attempt.accuracy,
                "" if left is None else _time(left),
            )
        failed = [task for task in runner.tasks if task.state == FAILED]
        room = max(1, self.console.height - len(runner.attempts) - 5)
        style = {"style": "red", "no_wrap": True, "overflow": "ellipsis"}
        lines = [Text(f"failed {task.name}: {task.reason}", **style) for task in failed[-room:]]
        if len(failed) > room:
            lines.insert(0, Text(f"{len(failed) - room} more failed", "red"))
        status = ("stopping: " if runner.stopping else "") + runner.status()
        return Group(table, *lines, Text(status, "bold"))


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    run_app(app)
