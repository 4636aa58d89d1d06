"""Running a sweep's cells beside other workers: which cells are left, and what became of each."""

import gc
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from fedpeft_dist.config.errors import ConfigError, one_line
from fedpeft_dist.runtime.interrupts import StopRequest, listen_for_stop
from fedpeft_dist.runtime.launch import find_launch
from fedpeft_dist.sweeps.expansion import Cell
from fedpeft_dist.tracking.run_directory import COMPLETE, FAILED, RUNNING
from fedpeft_dist.tracking.run_lock import Owner, RunInUseError
from fedpeft_dist.tracking.same_run import differing_keys, is_complete, with_choices_of
from fedpeft_dist.tracking.sweep_axes import write_axes


@dataclass
class Outcome:
    """A worker's results: the names of cells."""

    complete: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Cells that were complete before."""
    taken: list[str] = field(default_factory=list)
    """Cells that another worker was running."""
    failed: list[str] = field(default_factory=list)
    interrupted: bool = False


def cell_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Index, name, state and directory of each cell; `waiting` is the state of one that has not begun."""
    return [
        {"index": cell.index, "name": cell.name, "state": cell_state(cell), "directory": str(cell.directory.path)}
        for cell in cells
    ]


def work_through(cells: Sequence[Cell], stop: StopRequest | None = None) -> Outcome:
    """Runs the cells in turn in this process, except those that are complete or that another worker is running.

    A cell that fails is reported and does not stop the others, unless this process has lost its GPU. A signal that asks
    a run to stop also stops the worker; without a caller's `stop`, signals are heard here. The errors of an only cell
    are raised, RunInUseError if it is in work. Several ranks with more than one cell are a ConfigError.
    """
    launch = find_launch()
    if launch.world_size > 1 and len(cells) > 1:
        raise ConfigError(f"--index: missing; {launch.world_size} ranks run one cell together, so say which")
    with listen_for_stop() if stop is None else nullcontext(stop) as stop:
        if len(cells) > 1:
            outcome = _run_in_turn(cells, stop, Owner.this_process(launch.slurm_job, launch.requeues))
        else:
            is_done = _run_cell(cells[0], stop)
            outcome = Outcome([cells[0].name] if is_done else [], interrupted=not is_done)
    if launch.rank == 0:
        parts = ("complete", "skipped", "taken", "failed")
        print(", ".join(f"{len(getattr(outcome, part))} {part}" for part in parts if getattr(outcome, part)))
    return outcome


def _run_in_turn(cells: Sequence[Cell], stop: StopRequest, this: Owner) -> Outcome:
    outcome = Outcome()
    for cell in cells:
        if stop.received or outcome.interrupted:
            outcome.interrupted = True
            break
        if cell_state(cell) == COMPLETE:
            outcome.skipped.append(cell.name)
            continue
        try:
            holder = cell.directory.holder()
            if holder is not None and not this.succeeds(holder):
                raise RunInUseError("another worker is running it")
            if _run_cell(cell, stop):
                outcome.complete.append(cell.name)
            else:
                outcome.interrupted = True
        except RunInUseError:
            outcome.taken.append(cell.name)
        except Exception as error:
            if not isinstance(error, ConfigError):
                traceback.print_exception(error)
            print(f"cell {cell.index} {cell.name} failed: {one_line(error)}", file=sys.stderr)
            record_failure(cell, one_line(error))
            outcome.failed.append(cell.name)
            if _gpu_is_lost():
                print("this process cannot use its GPU any more; the same command goes on", file=sys.stderr)
                break
        gc.collect()  # a model and its parameters refer to each other, and the next cell needs the memory
    return outcome


def _run_cell(cell: Cell, stop: StopRequest) -> bool:
    """Runs a cell, and writes its axes into its directory for reports. Returns whether it is complete."""
    from fedpeft_dist.federation.run import run

    is_done = run(cell.config, stop) == COMPLETE
    if is_done and cell.axes and find_launch().rank == 0:
        write_axes(cell.directory.path, cell.axes)
    return is_done


def _gpu_is_lost() -> bool:
    """Whether every further use of this process's GPU will fail: some errors last as long as the process."""
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def record_failure(cell: Cell, reason: str) -> None:
    """Writes the reason into the state of a cell that has failed before its first round, for reports to find."""
    with suppress(ConfigError, OSError):  # the failure may be the directory's
        state = cell.directory.read_state()
        if state is None or not state.get("next_round"):  # the state of a run that got further stays
            cell.directory.write_state(FAILED, 0, error=reason)


def cell_state(cell: Cell) -> str:
    """The state of the cell's run; `waiting` if it has not begun, or if its config now asks for more rounds.

    `other config`: a run under the cell's name that the sweep file no longer describes. `damaged`: the run's files
    cannot be read, and running the cell says how. `stopped`: the run's process was killed; running the cell goes on.
    """
    try:
        state, stored = cell.directory.read_state(), cell.directory.stored_config()
    except (ConfigError, OSError):
        return "damaged"
    if state is None:
        return "waiting"
    if stored is not None and differing_keys(stored, with_choices_of(stored, cell.config)):
        return "other config"
    if state["state"] == COMPLETE and not is_complete(state, cell.config):
        return "waiting"
    with suppress(OSError):  # another user's run cannot be locked
        if state["state"] == RUNNING and not cell.directory.in_use():
            return "stopped"
    return state["state"]
