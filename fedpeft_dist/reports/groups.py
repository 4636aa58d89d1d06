"""Complete runs that differ in their seed alone, as one group: its accuracy, its curve, its bytes."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedpeft_dist.lanes.wire import BYTES_PER_PARAMETER, MIB
from fedpeft_dist.reports.axes import COHORT, Axis, Keys, find_axes, in_order, short_names, show, telling
from fedpeft_dist.reports.runs import Point, Run, is_number

ROUNDING_KEYS = ("runtime.device", "runtime.lanes", "runtime.threads", "runtime.evaluate_batch", "privacy.slots")
"""Keys that follow the machine and change a result by rounding alone. Groups ignore them unless a sweep varies them."""


@dataclass(frozen=True)
class Statistic:
    """Mean and standard deviation over seeds. A seed that was run twice counts once."""

    mean: float
    std: float | None
    """Standard deviation of the sample; None for a single seed."""
    seeds: int

    @classmethod
    def over(cls, values: Iterable[tuple[Any, float]]) -> "Statistic":
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
    """The config values that the runs have in common."""
    method: str = ""
    axes: dict[str, Any] = field(default_factory=dict)
    """The value on every axis."""
    label: str = ""

    @property
    def accuracy(self) -> Statistic:
        return Statistic.over((run.seed, run.summary["final_accuracy"]) for run in self.runs)

    @property
    def best_accuracy(self) -> Statistic:
        found = [(run.seed, run.summary.get("best_accuracy")) for run in self.runs]
        found = [(seed, value) for seed, value in found if is_number(value)]
        return Statistic.over(found) if found else self.accuracy

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
        """None where the clients take no simulated time."""
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
        """The privacy that each run states; empty for runs without privacy."""
        return [run.privacy for run in self.runs if run.privacy is not None]

    @property
    def epsilon(self) -> float | None:
        """The largest epsilon of the runs; None without a guarantee."""
        return max((run.epsilon for run in self.runs if run.epsilon is not None), default=None)

    def curve(self) -> list[tuple[Point, Statistic]]:
        """The rounds that all runs with metrics have evaluated, and their mean accuracy, bytes and hours."""
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
    """The group with the fewest bytes comes first."""
    varying: tuple[Axis, ...]
    """Every axis with more than one value; the telling axes come first."""
    telling: tuple[Axis, ...]
    """The axes that, with the method, tell all groups apart. The other axes vary along with these."""

    @property
    def note(self) -> str:
        along = [axis.name for axis in self.varying if axis not in self.telling]
        return f"Varies along with these: {', '.join(along)}." if along else ""

    @property
    def data_axis(self) -> Axis | None:
        """The axis along which the data sets differ; None where all groups have one data set."""
        return next((axis for axis in self.telling if "data.name" in axis.keys), None)

    def data_set(self, group: Group) -> str:
        return show(group.axes[self.data_axis.name] if self.data_axis else group.keys["data.name"])

    def by_data_set(self) -> dict[str, list[Group]]:
        found = defaultdict(list)
        for group in self.groups:
            found[self.data_set(group)].append(group)
        return {name: found[name] for name in sorted(found, key=in_order)}

    def label(self, group: Group, without: Sequence[Axis] = ()) -> str:
        """The method and the values on the telling axes, except some: `bias, iid, lr 0.1`."""
        names = short_names(axis.name for axis in self.telling)
        axes = [axis for axis in self.telling if axis not in without]
        values = [f"{'' if a.speaks else names[a.name] + ' '}{show(group.axes[a.name])}" for a in axes]
        return ", ".join([group.method, *values])

    def rows(self, groups: Iterable[Group], without: Sequence[Axis]) -> list[list[Group]]:
        """Groups of one method and one value on the telling axes, except some; the fewest bytes come first."""
        axes = [axis for axis in self.telling if axis not in without]
        found = defaultdict(list)
        for group in groups:
            found[(group.method, *(repr(group.axes[axis.name]) for axis in axes))].append(group)

        def place(row: list[Group]) -> tuple:
            values = [in_order(row[0].axes[axis.name]) for axis in axes]
            return (values, max(group.mib_per_round for group in row), row[0].method)

        return sorted(found.values(), key=place)


def group_runs(runs: Sequence[Run]) -> Grouping:
    """Groups the complete runs among these."""
    complete = [run for run in runs if run.summary is not None]
    swept = {key for run in complete for choice in run.axes.values() for key in choice.keys}
    ignored = {"seed", *(key for key in ROUNDING_KEYS if key not in swept)}
    alike = defaultdict(list)
    for run in complete:
        alike[repr(sorted((key, value) for key, value in run.keys.items() if key not in ignored))].append(run)
    bare = [
        Group(tuple(found), {key: value for key, value in found[0].keys.items() if key not in ignored})
        for found in alike.values()
    ]
    axes = find_axes([group.runs[0] for group in bare], [group.keys for group in bare])
    groups = [replace(g, method=method, axes=values) for g, method, values in zip(bare, axes.methods, axes.values)]
    return _with_labels(groups, axes.axes)


def _with_labels(groups: Sequence[Group], axes: Sequence[Axis]) -> Grouping:
    varying = {axis.name: axis for axis in axes if len({repr(group.axes[axis.name]) for group in groups}) > 1}
    rows = [{**group.axes, "": group.method} for group in groups]
    data_sets = [name for name, axis in varying.items() if "data.name" in axis.keys]
    names = [*data_sets, *telling(rows, varying, given=["", *data_sets])]
    ordered = tuple(varying[name] for name in dict.fromkeys([*names, *varying]))
    grouping = Grouping(tuple(groups), ordered, ordered[: len(names)])
    labelled = [replace(group, label=grouping.label(group)) for group in groups]
    labelled.sort(key=lambda group: (group.mib_total, in_order(group.label)))
    return replace(grouping, groups=tuple(labelled))


def _mean_point(points: Sequence[Point]) -> Point:
    """Seeds may differ in the bytes and hours of a round, because clients can be lost."""
    hours = [point.hours for point in points]
    sent = statistics.fmean(point.mib_sent for point in points)
    return replace(points[0], mib_sent=sent, hours=None if None in hours else statistics.fmean(hours))
