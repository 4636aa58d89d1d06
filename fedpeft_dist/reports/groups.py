"""Complete runs that differ in their seed alone, as one group: its accuracy, its curve, its bytes."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fedpeft_dist.lanes.wire import MIB
from fedpeft_dist.reports.axes import COHORT, Axis, find_axes, in_order, short_names, show, telling
from fedpeft_dist.reports.runs import Point, Run, is_number

ROUNDING_KEYS = {"runtime.device", "runtime.lanes", "runtime.threads", "runtime.evaluate_batch", "privacy.slots"}
"""Keys that follow the machine and change a result by rounding alone. Groups ignore them unless a sweep varies them."""


class Statistic(NamedTuple):
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


class Group:
    """Runs with the same config but for the keys that are ignored. `group_runs` adds what tells groups apart."""

    def __init__(self, runs: Sequence[Run], ignored: set[str]):
        first = runs[0].summary
        hours = [run.summary.get("simulated_hours") for run in runs]
        best = [(run.seed, run.summary.get("best_accuracy")) for run in runs]
        best = [(seed, value) for seed, value in best if is_number(value)]
        self.method, self.label = "", ""
        self.axes: dict[str, Any] = {}  # the value on every axis
        self.runs = runs
        self.keys = {key: value for key, value in runs[0].keys.items() if key not in ignored}
        self.seeds = sorted({run.seed for run in runs})
        self.num_seeds = len(self.seeds)
        self.accuracy = Statistic.over((run.seed, run.summary["final_accuracy"]) for run in runs)
        self.best_accuracy = Statistic.over(best) if best else self.accuracy
        self.curve = _mean_curve(runs)
        self.is_timed = bool(self.curve) and all(point.hours is not None for point in self.curve)
        self.trained_parameters = first["trainable_parameters"]
        self.share_of_full = self.trained_parameters / first["backbone_parameters"]
        self.cohort = self.keys[COHORT]
        self.mib_per_client = runs[0].mib_per_client
        self.mib_per_round = self.mib_per_client * self.cohort
        self.mib_total = statistics.fmean(run.summary["uplink_bytes_total"] for run in runs) / MIB
        self.simulated_hours = statistics.fmean(hours) if all(map(is_number, hours)) else None
        self.mechanism = self.keys["privacy.name"]
        self.privacy = [run.privacy for run in runs if run.privacy]
        # The largest epsilon of the runs; None without a guarantee.
        self.epsilon = max((found["epsilon"] for found in self.privacy if found["epsilon"] is not None), default=None)


def _mean_curve(runs: Sequence[Run]) -> list[Point]:
    """The rounds that all runs with metrics have evaluated. Lost clients make bytes and hours differ between seeds."""
    by_round = defaultdict(list)
    for run in runs:
        for point in run.curve:
            by_round[point.round].append((run.seed, point))
    num_curves, points = sum(bool(run.curve) for run in runs), []
    for number, found in sorted(by_round.items()):
        if len(found) == num_curves:
            accuracy = Statistic.over((seed, point.mean) for seed, point in found)
            sent = statistics.fmean(point.mib for _, point in found)
            hours = [point.hours for _, point in found]
            mean_hours = None if None in hours else statistics.fmean(hours)
            points.append(Point(number, sent, mean_hours, accuracy.mean, accuracy.std or 0.0))
    return points


class Grouping(NamedTuple):
    groups: list[Group]
    """The group with the fewest bytes comes first."""
    varying: list[Axis]
    """Every axis with more than one value; the telling axes come first."""
    telling: list[Axis]
    """The axes that, with the method, tell all groups apart. The other axes vary along with these."""
    data_axis: Axis | None
    """The axis along which the data sets differ; None where all groups have one data set."""
    note: str

    def value(self, group: Group, axis: Axis | None) -> str:
        """A group's value on an axis; without an axis the data set, which all groups share."""
        return show(group.axes[axis.name] if axis else group.keys["data.name"])

    def by_data_set(self) -> dict[str, list[Group]]:
        found = defaultdict(list)
        for group in self.groups:
            found[self.value(group, self.data_axis)].append(group)
        return {name: found[name] for name in sorted(found, key=in_order)}

    def label(self, group: Group, without: Sequence[Axis | None] = ()) -> str:
        """The method and the values on the telling axes, except some: `bias, iid, lr 0.1`."""
        names = short_names(axis.name for axis in self.telling)
        axes = [axis for axis in self.telling if axis not in without]
        values = [f"{'' if a.speaks else names[a.name] + ' '}{show(group.axes[a.name])}" for a in axes]
        return ", ".join([group.method, *values])

    def rows(self, groups: Iterable[Group], without: Sequence[Axis | None] = ()) -> list[list[Group]]:
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
    complete = [run for run in runs if run.summary]
    swept = {key for run in complete for choice in run.axes.values() for key in choice.keys}
    ignored = {"seed", *ROUNDING_KEYS.difference(swept)}
    alike = defaultdict(list)
    for run in complete:
        alike[repr(sorted((key, value) for key, value in run.keys.items() if key not in ignored))].append(run)
    groups = [Group(found, ignored) for found in alike.values()]
    axes, methods, values = find_axes([group.runs[0] for group in groups], [group.keys for group in groups])
    for group, method, found in zip(groups, methods, values):
        group.method, group.axes = method, found
    varying = {axis.name: axis for axis in axes if len({repr(group.axes[axis.name]) for group in groups}) > 1}
    rows = [{**group.axes, "": group.method} for group in groups]
    data_sets = [name for name, axis in varying.items() if "data.name" in axis.keys]
    names = [*data_sets, *telling(rows, varying, given=["", *data_sets])]
    ordered = [varying[name] for name in dict.fromkeys([*names, *varying])]
    along = ", ".join(axis.name for axis in ordered[len(names) :])
    note = f"Varies along with these: {along}." if along else ""
    grouping = Grouping(groups, ordered, ordered[: len(names)], varying[data_sets[0]] if data_sets else None, note)
    for group in groups:
        group.label = grouping.label(group)
    groups.sort(key=lambda group: (group.mib_total, in_order(group.label)))
    return grouping
