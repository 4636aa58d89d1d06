"""From a sweep file to its cells: their configs, their order and their names."""

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
from fedpeft_dist.config.explain import explain_message
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

    Raises:
        ConfigError: a file cannot be read, a key or a config is not valid, or two cells have the same name.
    """
    sweep = _read_sweep(path)
    base = read_tree(path.parent / sweep.base)
    last = parse_overrides(overrides)
    _refuse_own_place(last, ("seed", "output.name"), "an override")
    seeds = sweep.seeds or (parse_config(base, str(path.parent / sweep.base)).seed,)
    cells: dict[str, Cell] = {}
    for axis_names, names, choices in _variants(sweep, path):
        variant = "-".join(names)
        try:
            own = [nest_keys(sweep.set), *map(_own_keys, choices)]
        except ConfigError as error:
            raise ConfigError(f"{path}, cell {variant}: {error}") from None
        for keys in own:
            _refuse_own_place(keys, ("seed", "output.name", "output.root"), str(path))
        extended = [_extended(choice, base, path) for choice in choices]
        layers = [*extended, *own]
        axes = {
            axis: AxisChoice(name, tuple(flatten_keys(merge_trees(parent, keys))))
            for axis, name, parent, keys in zip(axis_names, names, extended, own[1:])
        }
        for seed in seeds:
            name = derived_name(variant, f"-seed{seed}")
            if name in cells:
                raise ConfigError(f"{path}: two cells are called {name!r}; give one of them another name")
            place = {"name": name} if sweep.output is None else {"name": name, "root": sweep.output}
            tree = reduce(merge_trees, [base, *layers, {"seed": seed, "output": place}, last])
            config = parse_config(tree, f"{path}, cell {name}")
            if sweep.output is None and "root" not in last.get("output", {}):
                config = _below_base_root(config, path)
            cells[name] = Cell(len(cells), name, config, axes)
    if not cells:
        raise ConfigError(f"{path}: a sweep without axes and cells has nothing to run; give one of them")
    return list(cells.values())


def load_cells(path: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """A sweep's cells; for a run's config, that run as the only cell.

    Raises:
        ConfigError: a file or a key that is not valid.
    """
    if is_sweep(read_yaml(path)):
        return load_sweep(path, overrides)
    config = load_run_config(path, overrides)
    return [Cell(0, config.output.name, config)]


def pick_cell(cells: Sequence[Cell], index: int, path: Path) -> Cell:
    """
    Raises:
        ConfigError: there is no such cell.
    """
    if not 0 <= index < len(cells):
        raise ConfigError(f"--index: {index} is no cell of {path}; give 0 to {len(cells) - 1}")
    return cells[index]


def _read_sweep(path: Path) -> SweepFile:
    tree = read_yaml(path)
    try:
        return SweepFile.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error.errors()[0])}") from None


def _explain(item: Mapping[str, Any]) -> str:
    """One of pydantic's errors in words. For an axis, which may be a mapping or a list, the mapping's comes first."""
    location = [str(part) for part in item["loc"] if not str(part).startswith("dict[")]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key of a sweep; known here: {', '.join(SweepFile.model_fields)}"
    if item["type"] == "missing":
        return f"{key}: missing; a sweep names its base config"
    if item["type"] == "value_error":
        return f"{key}: {item['ctx']['error']}"
    if location[-1] == "[key]":
        key = ".".join(location[:-2])
        return (
            f"{key}: {item['input']!r} is no name; on, off, yes and no mean booleans in YAML: quote them, and numbers"
        )
    if location[0] == "axes" and len(location) == 2:
        return f"{key}: {item['input']!r}: should be a list of values, or a mapping of names to keys"
    return f"{key}: {item['input']!r}: {explain_message(item)}"


def _variants(sweep: SweepFile, path: Path) -> Iterator[tuple[list[str], list[str], list[Choice]]]:
    """Axes, names and choices of each combination of the axes, and then of each further cell, which has no axes."""
    for key, axis in sweep.axes.items():
        if not axis:
            raise ConfigError(f"{path}: axes.{key}: no values; give some, or leave the axis out")
    axes = [list(_axis_choices(key, axis, sweep, path)) for key, axis in sweep.axes.items()]
    for combination in itertools.product(*axes) if axes else ():
        names, choices = zip(*combination)
        yield list(sweep.axes), list(names), list(choices)
    for name, choice in sweep.cells.items():
        yield [], [_checked_name(name, path)], [choice]


def _axis_choices(
    key: str, axis: Mapping[str, Choice] | Sequence[Any], sweep: SweepFile, path: Path
) -> Iterator[tuple[str, Choice]]:
    if isinstance(axis, Mapping):
        named = list(axis.items())
    else:
        short = _short_name(key, sweep.axes)
        named = [(f"{short}{value}", {key: value}) for value in axis]
    for name, choice in named:
        if not isinstance(axis, Mapping) and not _FILE_NAME.fullmatch(name):
            value = choice[key]
            raise ConfigError(
                f"{path}: axes.{key}: {value!r} makes no directory's name; give it one: {key}: {{short-name: {{{key}: "
                f"{json.dumps(value)}}}}}"
            )
        yield _checked_name(name, path), choice


def _short_name(key: str, axes: Mapping[str, Any]) -> str:
    """The last part of a key, or as many parts as distinguish it from the other axes' keys."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        short = ".".join(parts[-count:])
        if sum(f".{other}".endswith(f".{short}") for other in axes) == 1:
            return short
    return key


def _refuse_own_place(tree: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    """
    Raises:
        ConfigError: the tree has a key that the sweep itself gives every cell.
    """
    for key in keys:
        section, _, leaf = key.rpartition(".")
        found = tree.get(section) if section else tree
        if isinstance(found, Mapping) and leaf in found:
            raise ConfigError(
                f"{where}: {key}: a sweep gives each cell its own; in its file, `seeds` lists the seeds and `output` "
                "says where the cells' directories go"
            )


def _extended(choice: Choice, base: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The keys in which the config file that a choice extends differs from the base; empty if it extends none."""
    parent = choice.get("extends")
    return {} if parent is None else _differences(read_tree(extended_file(path, parent)), base)


def _differences(tree: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The keys whose values differ from the base's. A section that chooses another name is taken whole."""
    found = {}
    for key, value in tree.items():
        old = base.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and value.get("name") == old.get("name"):
            inner = _differences(value, old)
            if inner:
                found[key] = {"name": value["name"], **inner} if "name" in value else inner
        elif value != old:
            found[key] = value
    return found


def _own_keys(choice: Choice) -> dict[str, Any]:
    return nest_keys({key: value for key, value in choice.items() if key != "extends"})


def _checked_name(name: str, path: Path) -> str:
    """The name of a choice, which becomes part of a directory's name."""
    if not _FILE_NAME.fullmatch(name):
        raise ConfigError(
            f"{path}: {name!r} cannot be part of a directory's name; give the choice a name of letters, digits, '.', "
            "'_', '+' and '-'"
        )
    return name


def _below_base_root(config: RunConfig, path: Path) -> RunConfig:
    resolved = path.resolve()
    root = Path(config.output.root) / derived_name(f"{resolved.parent.name}-{resolved.stem}")
    return with_values(config, "output", root=str(root))
