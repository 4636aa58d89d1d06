"""Sweeps: one file that describes many runs, and workers that share them out.

A sweep file names a base config and what varies:

    base: ../paper/cifar100/base.yaml        # a run's config, relative to this file
    output: runs/sweeps/example              # where the cells' directories go; null: below the base's output.root
    set: {federation.rounds: 20}             # keys that all cells share, over the base
    axes:                                    # every combination is a cell
      method:                                # choices by name: keys to set, which may extend a config file, ...
        bias: {extends: ../paper/cifar100/bias.yaml}
        head: {method: {name: head}, client.optimizer.lr: 0.005}
      federation.cohort: [8, 64]             # ... or a key and its values
    cells:                                   # further cells, by name
      full-m1: {extends: ../paper/cifar100/full.yaml, federation.cohort: 1}
    seeds: [1, 42, 3407]                     # each of these is run with each seed

The files that a cell's choices extend are read over the base first, then `set`, then the choices' own keys; a later
axis wins over an earlier one. Cells are numbered in this order, the last axis faster than the first and the seed
fastest. A cell is called by its choices and its seed, and its run lies in the directory of that name: so any number of
workers can go through the same list, a run's lock tells what is being worked at, its state what is complete.
"""

from __future__ import annotations

import gc
import itertools
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import (
    merge_trees,
    nest_keys,
    parse_config,
    parse_overrides,
    read_tree,
    read_yaml,
    with_values,
)
from fedpeft_dist.config.schema import RunConfig, Section
from fedpeft_dist.tracking.run_directory import COMPLETE, RunDirectory, RunInUseError

Choice = dict[str, Any]
"""Keys to set, dotted or nested; `extends` names a config file to take keys from first."""
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class SweepFile(Section):
    """What a sweep file may hold."""

    base: str
    output: str | None = None
    set: Choice = Field({})
    axes: dict[str, dict[str, Choice] | list[Any]] = Field({})
    cells: dict[str, Choice] = Field({})
    seeds: tuple[int, ...] = Field((1,), strict=False, min_length=1)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    index: int
    name: str
    config: RunConfig

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(Path(self.config.output.root) / self.config.output.name)


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


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """A sweep's cells in their order; `key=value` overrides go over every one of them.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a config that is not valid, two cells of one name.
    """
    sweep = _read_sweep(path)
    base = read_tree(path.parent / sweep.base)
    last = parse_overrides(overrides)
    cells: dict[str, Cell] = {}
    for variant, choices in _variants(sweep, path):
        layers = [*(_extended(choice, path) for choice in choices), nest_keys(sweep.set), *map(_own_keys, choices)]
        for seed in sweep.seeds:
            name = f"{variant}-seed{seed}"
            if name in cells:
                raise ConfigError(f"{path}: two cells are called {name!r}; give one of them another name")
            place = {"name": name} if sweep.output is None else {"name": name, "root": sweep.output}
            tree = reduce(merge_trees, [base, *layers, {"seed": seed, "output": place}, last])
            config = parse_config(tree, f"{path}, cell {name}")
            if sweep.output is None and "root" not in last.get("output", {}):
                config = _below_base_root(config, path)
            cells[name] = Cell(len(cells), name, config)
    if not cells:
        raise ConfigError(f"{path}: a sweep without axes and cells has nothing to run; give one of them")
    return list(cells.values())


def pick_cell(cells: Sequence[Cell], index: int, path: Path) -> Cell:
    """
    Raises:
        ConfigError: there is no such cell.
    """
    if not 0 <= index < len(cells):
        raise ConfigError(f"--index: {index} is no cell of {path}; give 0 to {len(cells) - 1}")
    return cells[index]


def cell_rows(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Index, name, state and directory of each cell; `waiting` is the state of one that has not begun."""
    return [
        {"index": cell.index, "name": cell.name, "state": _state(cell), "directory": str(cell.directory.path)}
        for cell in cells
    ]


def count_states(rows: Iterable[Mapping[str, Any]]) -> str:
    """How many cells are in which state, in words."""
    counts = Counter(row["state"] for row in rows)
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))


def work_through(cells: Sequence[Cell]) -> Outcome:
    """Runs the cells one after another in this process, but those that are complete or that another worker is at.

    A cell that fails is reported and does not stop the others; a signal that asks a run to stop does.

    Raises:
        ConfigError: this process is one of several ranks and there is more than one cell.
        RunInUseError: the only cell is in work.
    """
    from fedpeft_dist.federation.rounds import start_and_run
    from fedpeft_dist.runtime.process import find_launch

    launch, alone = find_launch(), len(cells) == 1
    if launch.world_size > 1 and not alone:
        raise ConfigError(f"--index: missing; {launch.world_size} ranks run one cell together, so say which")
    outcome = Outcome()
    for cell in cells:
        label = f"cell {cell.index} {cell.name}"
        try:
            if not alone and _state(cell) == COMPLETE:
                outcome.skipped.append(cell.name)
                continue
            if not alone and cell.directory.in_use():
                raise RunInUseError("another worker is at it")
            if start_and_run(cell.config) != COMPLETE:
                outcome.interrupted = True
                break
            outcome.complete.append(cell.name)
        except RunInUseError:
            if alone:
                raise
            outcome.taken.append(cell.name)
        except Exception as error:
            if alone:
                raise
            if not isinstance(error, ConfigError):
                traceback.print_exc()
            print(f"{label} failed: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
            outcome.failed.append(cell.name)
        gc.collect()  # a model and its parameters refer to each other, and the next cell needs the memory
    if launch.rank == 0:
        parts = ("complete", "skipped", "taken", "failed")
        print(", ".join(f"{len(getattr(outcome, part))} {part}" for part in parts if getattr(outcome, part)))
    return outcome


def _read_sweep(path: Path) -> SweepFile:
    tree = read_yaml(path)
    try:
        return SweepFile.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(SweepFile.model_fields)
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{path}: {key}: unknown key of a sweep; known here: {known}") from None
        if first["type"] == "missing":
            raise ConfigError(f"{path}: {key}: missing; a sweep names its base config") from None
        raise ConfigError(f"{path}: {key}: {first['input']!r}: {first['msg'].lower()}") from None


def _variants(sweep: SweepFile, path: Path) -> Iterator[tuple[str, list[Choice]]]:
    """The name and the choices of each combination of the axes, and then of each further cell."""
    axes = [list(_axis_choices(key, axis, path)) for key, axis in sweep.axes.items()]
    for combination in itertools.product(*axes) if axes else ():
        yield "-".join(name for name, _ in combination), [choice for _, choice in combination]
    for name, choice in sweep.cells.items():
        yield _checked_name(name, path), [choice]


def _axis_choices(key: str, axis: Mapping[str, Choice] | Sequence[Any], path: Path) -> Iterator[tuple[str, Choice]]:
    if isinstance(axis, Mapping):
        named = list(axis.items())
    else:
        named = [(f"{key.rpartition('.')[2]}{value}", {key: value}) for value in axis]
    for name, choice in named:
        yield _checked_name(name, path), choice


def _extended(choice: Choice, path: Path) -> dict[str, Any]:
    """The keys of the config file that a choice extends; none where it extends none."""
    parent = choice.get("extends")
    if parent is None:
        return {}
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: {parent!r} is not a path relative to this file")
    return read_tree(path.parent / parent)


def _own_keys(choice: Choice) -> dict[str, Any]:
    return nest_keys({key: value for key, value in choice.items() if key != "extends"})


def _checked_name(name: str, path: Path) -> str:
    """A choice's name, which becomes part of a directory's."""
    if not _FILE_NAME.fullmatch(name):
        raise ConfigError(
            f"{path}: {name!r} cannot be part of a directory's name; give the choice a name of letters, digits, '.', "
            "'_', '+' and '-'"
        )
    return name


def _below_base_root(config: RunConfig, path: Path) -> RunConfig:
    resolved = path.resolve()
    root = Path(config.output.root) / f"{resolved.parent.name}-{resolved.stem}"
    return with_values(config, "output", root=str(root))


def _state(cell: Cell) -> str:
    """Of the cell's run; a complete one that its config now wants longer counts as waiting."""
    state = cell.directory.read_state()
    if state is None:
        return "waiting"
    if state["state"] == COMPLETE and state.get("next_round", 0) < cell.config.federation.rounds:
        return "waiting"
    return state["state"]
