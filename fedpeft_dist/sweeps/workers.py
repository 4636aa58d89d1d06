"""Working through a sweep's cells, beside other workers: what is to be done, and what has become of it."""

from __future__ import annotations

import gc
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.runtime.interrupts import StopRequest, listen_for_stop
from fedpeft_dist.sweeps.expansion import Cell
from fedpeft_dist.tracking.run_directory import (
    COMPLETE,
    FAILED,
    RUNNING,
    differing_keys,
    is_complete,
    with_choices_of,
)
from fedpeft_dist.tracking.run_lock import Owner, RunInUseError
from fedpeft_dist.tracking.sweep_axes import write_axes


@dataclass
class Outcome:
    """What a worker did, by the cells' names."""

    complete: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Complete before."""
    taken: list[str] = field(default_factory=list)
    """Another worker was at them."""
    failed: list[str] = field(default_factory=list)
    interrupted: bool = False


def cell_rows(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Index, name, state and directory of each cell; `waiting` is the state of one that has not begun."""
    return [
        {"index": cell.index, "name": cell.name, "state": cell_state(cell), "directory": str(cell.directory.path)}
        for cell in cells
    ]


def count_states(rows: Iterable[Mapping[str, Any]]) -> str:
    """How many cells are in which state, in words."""
    counts = Counter(row["state"] for row in rows)
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))


def work_through(cells: Sequence[Cell], stop: StopRequest | None = None) -> Outcome:
    """Runs the cells one after another in this process, but those that are complete or that another worker is at.

    A cell that fails is reported and does not stop the others, unless it takes the GPU along; a signal that asks a run
    to stop does.

    Args:
        stop: of a caller that listens for signals itself; None listens here.

    Raises:
        ConfigError: this process is one of several ranks and there is more than one cell.
        RunInUseError: the only cell is in work.
    """
    from fedpeft_dist.federation.run import start_and_run
    from fedpeft_dist.runtime.launch import find_launch

    launch, alone = find_launch(), len(cells) == 1
    outcome = Outcome()
    if launch.world_size > 1 and not alone:
        raise ConfigError(f"--index: missing; {launch.world_size} ranks run one cell together, so say which")
    this = Owner.this_process(launch.slurm_job, launch.requeues)
    with listen_for_stop() if stop is None else nullcontext(stop) as stop:
        for cell in cells:
            if stop.received and not alone:  # in the last round of the cell before, or between the two
                outcome.interrupted = True
                break
            try:
                if not alone and cell_state(cell) == COMPLETE:
                    outcome.skipped.append(cell.name)
                    continue
                holder = None if alone else cell.directory.holder()
                if holder is not None and not this.succeeds(holder):
                    raise RunInUseError("another worker is at it")
                if start_and_run(cell.config, stop) != COMPLETE:
                    outcome.interrupted = True
                    break
                if cell.axes and launch.rank == 0:
                    write_axes(cell.directory.path, cell.axes)
                outcome.complete.append(cell.name)
            except RunInUseError:
                if alone:
                    raise
                outcome.taken.append(cell.name)
            except Exception as error:
                if alone:
                    raise
                _report_failure(cell, error)
                outcome.failed.append(cell.name)
                if _gpu_is_lost():
                    print("this process cannot use its GPU any more; the same command goes on", file=sys.stderr)
                    break
            gc.collect()  # a model and its parameters refer to each other, and the next cell needs the memory
    if launch.rank == 0:
        parts = ("complete", "skipped", "taken", "failed")
        print(", ".join(f"{len(getattr(outcome, part))} {part}" for part in parts if getattr(outcome, part)))
    return outcome


def _gpu_is_lost() -> bool:
    """Whether whatever this process asks of its GPU will fail: some errors last as long as the process."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _report_failure(cell: Cell, error: Exception) -> None:
    if not isinstance(error, ConfigError):
        traceback.print_exception(error)
    reason = " ".join(str(error).split()) or type(error).__name__
    print(f"cell {cell.index} {cell.name} failed: {reason}", file=sys.stderr)
    record_failure(cell, reason)


def record_failure(cell: Cell, reason: str) -> None:
    """Leaves the reason where reports look for it, for a cell that has failed before its first round."""
    with suppress(ConfigError, OSError):  # it may be the directory that is at fault
        state = cell.directory.read_state()
        if state is None or not state.get("next_round"):  # else what stands there tells of a run that got further
            cell.directory.write_state(FAILED, 0, error=reason)


def cell_state(cell: Cell) -> str:
    """Of the cell's run; a complete one that its config now wants longer counts as waiting.

    `other config` is a run under the cell's name that the sweep file no longer describes, `damaged` one whose files
    cannot be read: running the cell says how. `stopped` is one whose process was killed: running the cell goes on.
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
    with suppress(OSError):  # another user's run, which cannot be locked
        if state["state"] == RUNNING and not cell.directory.in_use():
            return "stopped"
    return state["state"]
