"""Complete runs that differ in their seed alone, as one group: its accuracy, its curve, its bytes."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedpeft_dist.lanes.wire import BYTES_PER_PARAMETER, MIB
from fedpeft_dist.reports.labels import COHORT, SPEAKING, AxisValue, Keys, find_axes, short_names
from fedpeft_dist.reports.runs import Point, Run, epsilon_of, is_number, privacy_of

ROUNDING_KEYS = ("runtime.device", "runtime.lanes", "runtime.threads", "runtime.evaluate_batch", "privacy.slots")
"""They follow the machine and move a result by rounding alone: runs may be averaged over them."""


@dataclass(frozen=True)
class Statistic:
    """Over seeds; a seed that was run twice counts once."""

    mean: float
    std: float | None
    """Of the sample; None for a single seed."""
    seeds: int

    @classmethod
    def over(cls, values: Iterable[tuple[Any, float]]) -> Statistic:
        by_seed = defaultdict(list)
        for seed, value in values:
            by_seed[seed].append(value)
        means = [statistics.fmean(found) for found in by_seed.values()]
        return cls(statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else None, len(means))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if self.std is None else f"{self.mean:.4f} ± {self.std:.4f}"


@dataclass(frozen=True, eq=False)
class Group:
    runs: tuple[Run, ...]
    keys: Keys
    accuracy: Statistic
    best_accuracy: Statistic
    axes: dict[str, AxisValue] = field(default_factory=dict)
    """Filled in by `group_runs`, for they depend on what the other groups are."""
    method: str = ""
    label: str = ""

    @property
    def seeds(self) -> list[Any]:
        return sorted({run.seed for run in self.runs})

    @property
    def parameters(self) -> int:
        return self.runs[0].summary["trainable_parameters"]

    @property
    def cohort(self) -> int:
        return self.keys[COHORT]

    @property
    def mib_per_client(self) -> float:
        return self.parameters * BYTES_PER_PARAMETER / MIB

    @property
    def mib_per_round(self) -> float:
        return self.mib_per_client * self.cohort

    @property
    def mib_total(self) -> float:
        return statistics.fmean(run.summary["uplink_bytes_total"] for run in self.runs) / MIB

    @property
    def simulated_hours(self) -> float | None:
        """None where its clients take no simulated time."""
        found = [run.summary.get("simulated_hours") for run in self.runs]
        return statistics.fmean(found) if all(is_number(hours) for hours in found) else None

    @property
    def share_of_full(self) -> float:
        return self.parameters / self.runs[0].summary["backbone_parameters"]

    @property
    def mechanism(self) -> str:
        return self.keys["privacy.name"]

    @property
    def privacy(self) -> list[Mapping[str, Any]]:
        """What its runs say of their privacy; empty for runs without."""
        return [found for run in self.runs if (found := privacy_of(run.summary)) is not None]

    @property
    def epsilon(self) -> float | None:
        """The largest of its runs'."""
        found = [epsilon for run in self.runs if (epsilon := epsilon_of(run.summary)) is not None]
        return max(found, default=None)

    def curve(self) -> list[tuple[Point, Statistic]]:
        """The rounds that all its runs with metrics have evaluated, and their mean accuracy, bytes and hours."""
        num_curves = sum(bool(run.curve) for run in self.runs)
        by_round = defaultdict(list)
        for run in self.runs:
            for point in run.curve:
                by_round[point.round].append((run.seed, point))
        return [
            (_mean_point([p for _, p in found]), Statistic.over((seed, point.accuracy) for seed, point in found))
            for _, found in sorted(by_round.items())
            if len(found) == num_curves
        ]


@dataclass(frozen=True)
class Grouping:
    groups: tuple[Group, ...]
    """Fewest bytes first."""
    settings: tuple[str, ...]
    """Axes of what is asked of a method: data, clients, partition, rounds. They split tables."""
    options: tuple[str, ...]
    """Axes of how a method is trained: rates, optimizers. They lengthen a method's label in a table."""
    distinguishing: tuple[str, ...]
    """Those of both, and in this order, that tell groups of one method apart; further ones vary along with them."""
    told: dict[str, tuple[str, ...]]
    """By axis, the config keys that its label gives."""

    def varying(self) -> list[str]:
        """Every axis with more than one value, the distinguishing ones first."""
        rest = [axis for axis in (*self.settings, *self.options) if axis not in self.distinguishing]
        return [axis for axis in (*self.distinguishing, *rest) if count(self.groups, [axis]) > 1]


def group_runs(runs: Sequence[Run]) -> Grouping:
    """Groups the complete runs among these."""
    alike = defaultdict(list)
    for run in runs:
        if run.summary is not None:
            alike[_frozen(run.keys, ("seed", *ROUNDING_KEYS))].append(run)
    bare = []
    for members in alike.values():
        # One seed on two machines' settings is a comparison of these settings, nothing to be averaged.
        by_seed = {(run.seed, _frozen(run.keys, ("seed",))) for run in members}
        if len(by_seed) == len({run.seed for run in members}):
            bare.append(_make_group(members, ROUNDING_KEYS))
            continue
        exact = defaultdict(list)
        for run in members:
            exact[_frozen(run.keys, ("seed",))].append(run)
        bare += [_make_group(found, ()) for found in exact.values()]
    return _with_labels(bare)


def tell(group: Group, axes: Iterable[str]) -> tuple[str, ...]:
    """A group's method and its labels on some axes."""
    return (group.method, *(group.axes[axis].label for axis in axes))


def count(groups: Iterable[Group], axes: Sequence[str]) -> int:
    """How many combinations of labels there are on some axes."""
    return len({tuple(group.axes[axis].label for axis in axes) for group in groups})


def refining(
    groups: Sequence[Group], candidates: Iterable[str], start: Callable[[Group], Any] = lambda group: None
) -> list[str]:
    """The candidates, one after another, that split what those before them and `start` leave together."""
    chosen: list[str] = []
    for axis in candidates:
        before = {(start(group), *(group.axes[a].label for a in chosen)) for group in groups}
        after = {(start(group), *(group.axes[a].label for a in (*chosen, axis))) for group in groups}
        if len(after) > len(before):
            chosen.append(axis)
    return chosen


def _mean_point(points: Sequence[Point]) -> Point:
    """What seeds sent by one round, and how long it took, differs where clients can be lost."""
    sent, hours, first = {p.mib_sent for p in points}, {p.hours for p in points}, points[0]
    if len(sent) > 1:
        first = replace(first, mib_sent=statistics.fmean(p.mib_sent for p in points))
    if len(hours) > 1:
        first = replace(first, hours=None if None in hours else statistics.fmean(p.hours for p in points))
    return first


def _frozen(keys: Keys, without: Iterable[str]) -> tuple:
    return tuple(sorted((key, repr(value)) for key, value in keys.items() if key not in without))


def _make_group(runs: list[Run], averaged_over: Sequence[str]) -> Group:
    keys = {key: value for key, value in runs[0].keys.items() if key not in ("seed", *averaged_over)}
    accuracy = Statistic.over((run.seed, run.summary["final_accuracy"]) for run in runs)
    best = [(run.seed, run.summary.get("best_accuracy")) for run in runs]
    best = [(seed, value) for seed, value in best if is_number(value)]
    return Group(tuple(runs), keys, accuracy, Statistic.over(best) if best else accuracy)


def _with_labels(bare: list[Group]) -> Grouping:
    populations = [next((r.partition["num_clients"] for r in group.runs if r.partition), None) for group in bare]
    axes = find_axes([group.keys for group in bare], populations)
    groups = [replace(g, method=method, axes=values) for g, method, values in zip(bare, axes.methods, axes.values)]
    distinguishing = refining(groups, (*axes.settings, *axes.options), lambda group: group.method)
    names = short_names(distinguishing)

    def label(group: Group) -> str:
        values = ((axis, group.axes[axis].label) for axis in distinguishing)
        return ", ".join([group.method, *(v if axis in SPEAKING else f"{names[axis]} {v}" for axis, v in values)])

    groups = [replace(group, label=label(group)) for group in groups]
    groups.sort(key=lambda group: (group.mib_total, _in_order_of_numbers(group.label)))
    return Grouping(tuple(groups), axes.settings, axes.options, tuple(distinguishing), axes.told)


def _in_order_of_numbers(label: str) -> list[str | float]:
    """To sort by: 2 before 5 before 20, where texts alone would have 20 before 5."""
    parts = re.split(r"(\d+(?:\.\d+)?)", label)
    return [float(part) if place % 2 else part for place, part in enumerate(parts)]
