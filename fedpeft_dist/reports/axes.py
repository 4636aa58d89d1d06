"""The axes along which the groups of a report differ, and each group's value on every axis.

A sweep knows its axes: every cell's directory names them in sweep.json. The report uses these axes if every complete
run has a choice on each of the same axes and the choices tell all groups apart.

For all other runs, an axis is a section of the config, such as `data.partition`, or a single key that belongs to no
section. Either way, two groups never have the same method and the same value on all axes.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from fedpeft_dist.config.schema import DataSection
from fedpeft_dist.reports.runs import Run

Keys: TypeAlias = Mapping[str, Any]
"""Config values by dotted key."""
DATA_SET, CLIENTS, PARTICIPATION = "data set", "clients", "participation"
MAX_TRAIN, NUM_CLIENTS, COHORT = "data.max_train", "data.clients", "federation.cohort"
NO_GUARANTEE = "paper_noise"
"""The one mechanism that is no differential privacy."""
_SECTIONS: dict[str, tuple[str, ...]] = {
    DATA_SET: (),
    "method": ("method.", "backbone.pretrained"),
    "backbone": ("backbone.",),
    CLIENTS: (NUM_CLIENTS, COHORT),
    "privacy": ("privacy.",),
    PARTICIPATION: ("federation.participation.",),
    "partition": ("data.partition.",),
}
"""The keys of each section, by how they begin; `data.` keys that only one data set has are the first section."""
_ALWAYS_TOLD = ("data.partition.alpha", "privacy.epsilon")
"""Labels give these values even where they do not differ."""
_ABSENT = "-"


class Axis(NamedTuple):
    name: str
    keys: tuple[str, ...]
    """The config keys that differ along the axis."""
    speaks: bool
    """Whether a value can stand in a label without the axis's name before it."""

    def sets(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.keys)


Axes: TypeAlias = tuple[list[Axis], list[str], list[dict[str, Any]]]
"""The axes; each group's method; each group's value on every axis: a config's own value, or text."""


def find_axes(runs: Sequence[Run], groups: Sequence[Keys]) -> Axes:
    """The axes of groups, given one run of each and the config values that each group's runs have in common."""
    sections: dict[str, list[str]] = {name: [] for name in _SECTIONS}
    found_keys = {key for group in groups for key in group}
    for key in sorted(found_keys, key=lambda key: (not key.endswith(".name"), key.count("."), key)):
        sections.setdefault(_section_of(key), []).append(key)
    axes: list[Axis] = []
    values: list[dict[str, Any]] = [{} for _ in groups]
    for name, keys in sections.items():
        if keys:
            axes.append(Axis(name, tuple(keys), speaks=name in _SECTIONS and name != "privacy"))
            for found, value in zip(values, _values(name, keys, groups)):
                found[name] = value
    methods = [found.pop("method") for found in values]
    return _sweep_axes(runs, methods) or ([axis for axis in axes if axis.name != "method"], methods, values)


def _sweep_axes(runs: Sequence[Run], methods: list[str]) -> Axes | None:
    """The axes of the sweep whose cells these runs are; None where the runs are not all cells with the same axes."""
    names = list(runs[0].axes) if runs else []
    if not names or any(set(run.axes) != set(names) for run in runs):
        return None
    axes = []
    for name in names:
        keys = dict.fromkeys(key for run in runs for key in run.axes[name].keys)
        axes.append(Axis(name, tuple(keys), speaks=name not in keys))
    values = [{name: run.keys.get(name, choice.name) for name, choice in run.axes.items()} for run in runs]
    method = next((axis for axis in axes if axis.speaks and axis.sets("method.")), None)
    if method is not None:
        axes.remove(method)
        methods = [str(found.pop(method.name)) for found in values]
    tells_all_apart = len({repr(pair) for pair in zip(methods, values)}) == len(runs)
    return (axes, methods, values) if tells_all_apart else None


def _section_of(key: str) -> str:
    if key.startswith("data.") and key.split(".")[1] not in DataSection.model_fields:
        return DATA_SET
    return next((name for name, prefixes in _SECTIONS.items() if key.startswith(prefixes)), key)


def _values(name: str, keys: Sequence[str], groups: Sequence[Keys]) -> list[Any]:
    """Each group's value on an axis: a key's value, or a name and what differs there: `adapter (bottleneck 8)`."""
    if name == CLIENTS:
        return [f"N={show(group[NUM_CLIENTS] or 'all')}, M={show(group[COHORT])}" for group in groups]
    if name not in _SECTIONS:
        values = [group.get(name, _ABSENT) for group in groups]
        return ["all" if value is None and name == MAX_TRAIN else value for value in values]
    head, *rest = keys
    by_name = defaultdict(list)
    for group in groups:
        by_name[group.get(head)].append(group)
    always = [key for key in rest if key in _ALWAYS_TOLD]
    told = {name: short_names([*always, *telling(alike, rest, always)]) for name, alike in by_name.items()}
    labels = []
    for group in groups:
        label, names = show(group.get(head, _ABSENT)), told[group.get(head)]
        details = [f"{short} {show(group[key])}" for key, short in names.items() if group.get(key) is not None]
        if label == NO_GUARANTEE:
            details = ["no guarantee", *(f"nominal {detail}" for detail in details)]
        labels.append(f"{label} ({', '.join(details)})" if details else label)
    return labels


def telling(rows: Sequence[Mapping[str, Any]], keys: Iterable[str], given: Sequence[str] = ()) -> list[str]:
    """The keys that tell rows apart, one after another. A key that varies only along with earlier keys is left out."""

    def kinds(chosen: Sequence[str]) -> int:
        return len({tuple(repr(row.get(key, _ABSENT)) for key in chosen) for row in rows})

    chosen = list(given)
    for key in keys:
        if kinds([*chosen, key]) > kinds(chosen):
            chosen.append(key)
    return chosen[len(given) :]


def show(value: Any) -> str:
    """A config's value in a label."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def in_order(value: Any) -> tuple:
    """A key to sort by: numbers by size, then text by the numbers in the text, then null."""
    if isinstance(value, int | float):
        return (0, value)
    parts = re.split(r"(\d+(?:\.\d+)?)", value or "")
    return (2,) if value is None else (1, [float(part) if place % 2 else part for place, part in enumerate(parts)])


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Each dotted key's last part, or the whole key where another key has the same last part; `x.name` is called x."""
    ends = {name: name.removesuffix(".name").rpartition(".")[2] for name in names}
    return {name: end if list(ends.values()).count(end) == 1 else name for name, end in ends.items()}
