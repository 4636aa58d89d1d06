"""From a sweep file, which describes many runs, to its cells: their configs, their order and their names.

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
    seeds: [1, 42, 3407]                     # every cell is run with each seed; null: the base's seed

A config file that a choice extends counts only where it differs from the base. These differences are laid over the base
first, then `set`, then the choices' own keys; a later axis wins over an earlier one.

Cells are numbered in this order: the last axis changes faster than the first, and the seed fastest. A cell is named by
its choices and its seed, and its run lies in the directory of that name. So any number of workers can go through the
same list: a run's lock shows that it is in work, its state that it is complete.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.explain import explain_error
from fedpeft_dist.config.load import extended_file, is_sweep, load_run_config, parse_config, read_tree, with_values
from fedpeft_dist.config.paths import UserPath, derived_name
from fedpeft_dist.config.schema import RunConfig, Section
from fedpeft_dist.config.trees import flatten_keys, merge_trees, nest_keys, parse_overrides
from fedpeft_dist.config.yaml_text import read_yaml
from fedpeft_dist.tracking.run_directory import RunDirectory
from fedpeft_dist.tracking.sweep_axes import AxisChoice

Choice = dict[str, Any]
"""Keys to set, dotted or nested; `extends` names a config file to take keys from first."""
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class SweepFile(Section):
    """The keys of a sweep file."""

    base: UserPath
    output: UserPath | None = None
    set: Choice = Field({})
    axes: dict[str, dict[str, Choice] | list[Any]] = Field({})
    cells: dict[str, Choice] = Field({})
    seeds: tuple[int, ...] | None = Field(None, strict=False, min_length=1)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    index: int
    name: str
    config: RunConfig
    axes: dict[str, AxisChoice] = field(default_factory=dict)
    """The choice by axis; empty for a cell that stands below `cells`."""

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(Path(self.config.output.root) / self.config.output.name)


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """A sweep's cells in their order; `key=value` overrides apply to all of them.

    Raises ConfigError if a file cannot be read, a key or a config is not valid, or two cells have the same name.
    """
    keys = read_yaml(path)
    try:
        sweep = SweepFile.model_validate(keys)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(keys, error.errors()[0])}") from None
    base = read_tree(path.parent / sweep.base)
    last = parse_overrides(overrides)
    _refuse_own_place(last, "an override", "seed", "output.name")
    seeds = sweep.seeds or (parse_config(base, str(path.parent / sweep.base)).seed,)
    cells: dict[str, Cell] = {}
    for axis_names, names, choices in _variants(sweep, path):
        for name in names:
            if not _FILE_NAME.fullmatch(name):
                raise ConfigError(
                    f"{path}: {name!r} cannot be part of a directory's name; give the choice a name of letters, "
                    "digits, '.', '_', '+' and '-'"
                )
        variant = "-".join(names)
        parents = [choice.get("extends") for choice in choices]
        extended = [
            _differences(read_tree(extended_file(path, file)), base) if file is not None else {} for file in parents
        ]
        own_keys = [{key: value for key, value in choice.items() if key != "extends"} for choice in choices]
        try:
            own = [nest_keys(keys) for keys in (sweep.set, *own_keys)]
        except ConfigError as error:
            raise ConfigError(f"{path}, cell {variant}: {error}") from None
        for keys in own:
            _refuse_own_place(keys, str(path), "seed", "output.name", "output.root")
        axes = {
            axis: AxisChoice(name, tuple(flatten_keys(merge_trees(parent, keys))))
            for axis, name, parent, keys in zip(axis_names, names, extended, own[1:])
        }
        for seed in seeds:
            name = derived_name(variant, f"-seed{seed}")
            if name in cells:
                raise ConfigError(f"{path}: two cells are called {name!r}; give one of them another name")
            place = {"name": name} if sweep.output is None else {"name": name, "root": sweep.output}
            tree = reduce(merge_trees, [base, *extended, *own, {"seed": seed, "output": place}, last])
            config = parse_config(tree, f"{path}, cell {name}")
            if sweep.output is None and "root" not in last.get("output", {}):
                folder = derived_name(f"{path.resolve().parent.name}-{path.resolve().stem}")
                config = with_values(config, "output", root=str(Path(config.output.root) / folder))
            cells[name] = Cell(len(cells), name, config, axes)
    if not cells:
        raise ConfigError(f"{path}: a sweep without axes and cells has nothing to run; give one of them")
    return list(cells.values())


def load_cells(path: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """A sweep's cells; for a run's config, that run as the only cell. Raises ConfigError as `load_sweep` does."""
    if is_sweep(read_yaml(path)):
        return load_sweep(path, overrides)
    config = load_run_config(path, overrides)
    return [Cell(0, config.output.name, config)]


def pick_cell(cells: Sequence[Cell], index: int, path: Path, name: str | None = None) -> Cell:
    """The cell with an index; raises ConfigError if there is none, or if it does not have the name that is expected."""
    if not 0 <= index < len(cells):
        raise ConfigError(f"--index: {index} is no cell of {path}; give 0 to {len(cells) - 1}")
    if name not in (None, cells[index].name):
        raise ConfigError(
            f"{path} has changed: cell {index} is called {cells[index].name} now, not {name}; start again"
        )
    return cells[index]


def _explain(keys: Mapping[str, Any], item: Mapping[str, Any]) -> str:
    """One of pydantic's errors in words. For an axis, which may be a mapping or a list, the mapping's comes first."""
    location = [str(part) for part in item["loc"] if not str(part).startswith("dict[")]
    if item["type"] == "extra_forbidden":
        return f"{location[0]}: unknown key of a sweep; known here: {', '.join(SweepFile.model_fields)}"
    if location[-1] == "[key]":
        key = ".".join(location[:-2])
        return (
            f"{key}: {item['input']!r} is no name; on, off, yes and no mean booleans in YAML: quote them, and numbers"
        )
    if location[0] == "axes" and len(location) == 2:
        return f"axes.{location[1]}: {item['input']!r}: should be a list of values, or a mapping of names to keys"
    return explain_error(keys, item)


def _variants(sweep: SweepFile, path: Path) -> Iterator[tuple[list[str], list[str], list[Choice]]]:
    """Axes, names and choices of each combination of the axes, and then of each further cell, which has no axes."""
    axes: list[list[tuple[str, Choice]]] = []
    for key, axis in sweep.axes.items():
        if not axis:
            raise ConfigError(f"{path}: axes.{key}: no values; give some, or leave the axis out")
        if isinstance(axis, Mapping):
            axes.append(list(axis.items()))
            continue
        short = _short_name(key, sweep.axes)
        axes.append([(f"{short}{value}", {key: value}) for value in axis])
        for name, choice in axes[-1]:
            if not _FILE_NAME.fullmatch(name):
                raise ConfigError(
                    f"{path}: axes.{key}: {choice[key]!r} makes no directory's name; give it one: {key}: "
                    f"{{short-name: {{{key}: {json.dumps(choice[key])}}}}}"
                )
    for combination in itertools.product(*axes) if axes else ():
        yield list(sweep.axes), [name for name, _ in combination], [choice for _, choice in combination]
    for name, choice in sweep.cells.items():
        yield [], [name], [choice]


def _short_name(key: str, axes: Mapping[str, Any]) -> str:
    """The last part of a key, or as many parts as distinguish it from the other axes' keys."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        short = ".".join(parts[-count:])
        if sum(f".{other}".endswith(f".{short}") for other in axes) == 1:
            return short
    return key


def _refuse_own_place(tree: Mapping[str, Any], where: str, *keys: str) -> None:
    """Refuses a tree with a key that the sweep itself gives every cell."""
    for key in keys:
        section, _, leaf = key.rpartition(".")
        found = tree.get(section) if section else tree
        if isinstance(found, Mapping) and leaf in found:
            raise ConfigError(
                f"{where}: {key}: a sweep gives each cell its own; in its file, `seeds` lists the seeds and `output` "
                "says where the cells' directories go"
            )


def _differences(tree: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The keys whose values differ from the base's. A section that chooses another name is taken whole."""
    found = {}
    for key, value in tree.items():
        old = base.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and value.get("name") == old.get("name"):
            if inner := _differences(value, old):
                found[key] = {"name": value["name"], **inner} if "name" in value else inner
        elif value != old:
            found[key] = value
    return found
