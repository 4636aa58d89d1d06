"""What a report compares, as tables of cells: by group, by communication, and by whatever else the groups differ in.

A cell of a comparison is one group, never a mean over several: what would put two groups into one cell splits the table
where it is a setting (a partition, a population), and lengthens the row's label where it is an option (a rate).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedpeft_dist.reports.groups import Group, Grouping, count, refining, tell
from fedpeft_dist.reports.labels import (
    BACKBONE,
    COHORT,
    DATA_SET,
    MAX_TRAIN,
    NUM_CLIENTS,
    PARTICIPATION,
    PARTITION,
    PARTITION_KIND,
    POPULATION,
    PRIVACY,
    SPEAKING,
    short_names,
)
from fedpeft_dist.reports.runs import Run, epsilon_of, privacy_of
from fedpeft_dist.tracking.run_directory import COMPLETE

TITLES = {
    POPULATION: "Client stability",
    PARTICIPATION: "Participation",
    PARTITION: "Data distribution",
    BACKBONE: "Backbone",
    PRIVACY: "Privacy",
    MAX_TRAIN: "Data scale",
}
NEVER, ALWAYS = 0, 9
"""When a terminal does without a column."""


@dataclass(frozen=True)
class Cell:
    text: str
    value: Any = None
    """What --json gives: a number or boolean of its own type, a text, the least and the largest number, or mean, std
    and seeds."""

    @property
    def sort_value(self) -> float | str | None:
        if isinstance(self.value, list):
            return self.value[-1]
        return self.value["mean"] if isinstance(self.value, dict) else self.value


EMPTY = Cell("")


@dataclass(frozen=True)
class Column:
    heading: str
    is_text: bool = False
    drop: int = NEVER
    """Which columns go first where a terminal is too narrow: the highest numbers."""


@dataclass(frozen=True)
class Table:
    kind: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def main_table(grouping: Grouping) -> Table:
    """One row a group, fewest bytes first."""
    groups = grouping.groups
    varying = grouping.varying()
    names = short_names(varying)
    private = any(group.privacy for group in groups)
    timed = any(group.simulated_hours is not None for group in groups)
    columns = [Column("method", is_text=True)]
    telling = grouping.distinguishing
    columns += [Column(names[axis], is_text=True, drop=NEVER if axis in telling else ALWAYS) for axis in varying]
    columns += [Column("trained parameters"), Column("clients a round", drop=1)]
    columns += [Column("MiB per client and round", drop=3), Column("MiB a round")]
    columns += [Column("total MiB", drop=4), Column("share of full's bytes", drop=2)]
    columns += [Column("simulated hours")] * timed + [Column("epsilon")] * private
    columns += [Column("final accuracy"), Column("seeds")]
    rows = []
    for group in groups:
        row = [Cell(group.method, group.method)]
        row += [label_cell(group, axis) for axis in varying]
        row += [
            Cell(f"{group.parameters:,}", group.parameters),
            Cell(f"{group.cohort:,}", group.cohort),
            Cell(f"{group.mib_per_client:,.4f}", group.mib_per_client),
            Cell(f"{group.mib_per_round:,.3f}", group.mib_per_round),
            Cell(f"{group.mib_total:,.2f}", group.mib_total),
            Cell(f"{group.share_of_full:.2%}", group.share_of_full),
        ]
        row += [hours_cell(group)] * timed + [epsilon_cell(group)] * private
        row += [accuracy_cell(group), Cell(str(group.accuracy.seeds), group.accuracy.seeds)]
        rows.append(tuple(row))
    along = varying_along(grouping, groups, grouping.distinguishing)
    return Table("groups", "All groups", tuple(columns), tuple(rows), along)


def unfinished_table(runs: Sequence[Run]) -> Table:
    columns = (Column("run", True), Column("state", True), Column("rounds done"), Column("what is wrong", True))
    rows = [
        (
            Cell(run.name, run.name),
            Cell(run.state, run.state),
            Cell(f"{run.rounds_done:,}", run.rounds_done),
            Cell(run.problem or "", run.problem),
        )
        for run in runs
        if run.state != COMPLETE or run.problem
    ]
    if not any(run.problem for run in runs):
        columns, rows = columns[:3], [row[:3] for row in rows]
    title = "Unfinished or damaged runs" if any(run.problem for run in runs) else "Unfinished runs"
    return Table("unfinished", title, columns, tuple(rows))


def run_table(runs: Sequence[Run], grouping: Grouping) -> Table:
    """One row a run, with every config key that differs between runs; for the CSV."""
    labels = {run.name: group.label for group in grouping.groups for run in group.runs}
    keys = sorted({key for run in runs for key in run.keys})
    differing = [k for k in keys if k != "seed" and len({repr(run.keys[k]) for run in runs if k in run.keys}) > 1]
    from_summary = ("trainable_parameters", "backbone_parameters", "uplink_bytes_total", "downlink_bytes_total")
    from_summary += ("simulated_hours", "final_accuracy", "best_accuracy", "samples_per_second", "weights_sha256")
    columns = ["run", "state", "group", "method.name", *(k for k in differing if k != "method.name")]
    rows = []
    for run in runs:
        summary = run.summary or {}
        values = [run.name, run.state, labels.get(run.name), *(run.keys.get(key) for key in columns[3:])]
        values += [run.seed, run.rounds_done, *(summary.get(key) for key in from_summary)]
        privacy = privacy_of(summary) or {}
        values += [epsilon_of(summary), *(privacy.get(key) for key in ("dp_delta", "noise_multiplier", "guarantee"))]
        values += [", ".join(privacy.get("outside") or ()), run.problem]
        rows.append(tuple(Cell("" if value is None else str(value), value) for value in values))
    columns += ["seed", "rounds_done", *from_summary]
    columns += ["epsilon", "dp_delta", "noise_multiplier", "guarantee", "outside_guarantee", "problem"]
    return Table("runs", "All runs", tuple(Column(name) for name in columns), tuple(rows))


# --- comparisons -------------------------------------------------------------------------------------------------


def comparison_tables(grouping: Grouping) -> list[Table]:
    """Those in which there is something to compare."""
    tables = communication_tables(grouping)
    first = (POPULATION, PARTICIPATION, PARTITION, MAX_TRAIN, BACKBONE, PRIVACY)
    rest = [axis for axis in grouping.distinguishing if axis not in (*first, DATA_SET)]
    for axis in (*first, *rest):
        if axis in grouping.distinguishing:
            tables += pivot_tables(grouping, axis)
    return [_tell_fewer_seeds(table) for table in tables]


def _tell_fewer_seeds(table: Table) -> Table:
    """Marks the accuracies that fewer seeds stand behind than behind the table's others."""
    seeds = [cell.value["seeds"] for row in table.rows for cell in row if isinstance(cell.value, dict)]
    most = max(seeds, default=0)

    def told(cell: Cell) -> Cell:
        few = isinstance(cell.value, dict) and cell.value["seeds"] < most
        return replace(cell, text=f"{cell.text} (n={cell.value['seeds']})") if few else cell

    note = f"n: seeds, {most} where none is told." if min(seeds, default=0) < most else ""
    rows = tuple(tuple(told(cell) for cell in row) for row in table.rows)
    return replace(table, rows=rows, note=" ".join(filter(None, [table.note, note])))


def communication_tables(grouping: Grouping) -> list[Table]:
    """The paper's: tuned parameters times clients, what a round sends, and accuracy in a column for each data set."""
    groups = grouping.groups
    kind = PARTITION_KIND
    if any(count(part, [PARTITION]) > count(part, [PARTITION_KIND]) for _, part in split(groups, [DATA_SET])):
        kind = PARTITION  # a data set has, say, two alphas
    settings = [s for s in grouping.settings if s not in (DATA_SET, POPULATION, PARTITION, NUM_CLIENTS, COHORT)]
    contexts = refining(groups, [NUM_CLIENTS, *settings, kind], _labels([DATA_SET]))
    tables = []
    for _, part in split(groups, contexts):
        if len(part) < 2:
            continue
        options = refining(part, grouping.options, lambda g: (g.method, *_labels([DATA_SET, COHORT])(g)))
        data_sets = split(part, [DATA_SET])
        partitions = count(part, [PARTITION]) > 1 and all(count(found, [PARTITION]) == 1 for _, found in data_sets)
        headings = [f"{key[0]}, {found[0].axes[PARTITION].label}" if partitions else key[0] for key, found in data_sets]
        columns = [Column("method", True), Column("tuned parameters x clients", True), Column("MiB a round")]
        columns += [Column(heading) for heading in headings]
        rows = []
        for row in _rows(part, [COHORT, *options], lambda group: group.mib_per_round):
            parameters = sorted({group.parameters for group in row})
            sent = sorted({group.mib_per_round for group in row})
            tuned = f"{_span([millions(p) for p in parameters])} x {row[0].cohort:,}"
            bytes_sent = sent[0] if len(sent) == 1 else [sent[0], sent[-1]]
            cells = [row_label(row, options, part), Cell(tuned, tuned)]
            cells.append(Cell(_span([f"{mib:,.2f}" for mib in sent]), bytes_sent))
            rows.append((*cells, *_accuracies(row, [key for key, _ in data_sets], [DATA_SET])))
        along = varying_along(grouping, part, (DATA_SET, COHORT, PARTITION, *contexts, *options))
        title = title_of("Communication", grouping, part, {DATA_SET, POPULATION}, extra=[NUM_CLIENTS])
        tables.append(Table("communication", title, tuple(columns), tuple(rows), along))
    return tables


@dataclass(frozen=True)
class Part:
    """Groups of one data set that differ in their method, on one axis, and in nothing else that is asked of them."""

    groups: list[Group]
    contexts: list[str]
    """Settings on which its groups agree and other parts differ."""
    options: list[str]
    """Axes that tell groups of one method and one value apart."""
    rows: list[list[Group]]
    """Groups of one method and the same options, the fewest parameters first; each has a value of its own."""


def parts(groups: Sequence[Group], grouping: Grouping, axis: str) -> Iterator[Part]:
    """What can be compared along an axis."""
    settings = [setting for setting in grouping.settings if setting not in (DATA_SET, axis)]
    candidates = [option for option in grouping.options if option != axis]
    for _, of_data_set in split(groups, [DATA_SET]):
        contexts = refining(of_data_set, settings, _labels([axis]))
        for _, part in split(of_data_set, contexts):
            options = refining(part, candidates, lambda g: (g.method, g.axes[axis].label))
            yield Part(part, contexts, options, _rows(part, options, lambda group: group.parameters))


def pivot_tables(grouping: Grouping, axis: str) -> list[Table]:
    """Methods down, an axis's values across; a table for each data set and each other setting that differs."""
    names = short_names((*grouping.settings, *grouping.options))
    tables = []
    for part in parts(grouping.groups, grouping, axis):
        across = [key for key, _ in split(part.groups, [axis])]
        if len(across) < 2:
            continue
        rows = [(row_label(row, part.options, part.groups), *_accuracies(row, across, [axis])) for row in part.rows]
        columns = [Column("method", True), *(Column(key[0]) for key in across)]
        title = title_of(TITLES.get(axis, f"By {names[axis]}"), grouping, part.groups, {axis})
        along = varying_along(grouping, part.groups, (axis, *part.contexts, *part.options))
        tables.append(Table(axis, title, tuple(columns), tuple(rows), along))
    return tables


def split(groups: Iterable[Group], axes: Sequence[str]) -> list[tuple[tuple[str, ...], list[Group]]]:
    """The groups by their labels on some axes, in the order of the axes' values."""
    found: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        found.setdefault(_labels(axes)(group), []).append(group)
    return sorted(found.items(), key=lambda item: [item[1][0].axes[axis].order for axis in axes])


def _labels(axes: Sequence[str]) -> Callable[[Group], tuple[str, ...]]:
    return lambda group: tuple(group.axes[axis].label for axis in axes)


def _rows(part: Sequence[Group], axes: Sequence[str], size: Callable[[Group], float]) -> list[list[Group]]:
    """Groups of one method and one value on these axes, the smallest first."""
    found: dict[tuple[str, ...], list[Group]] = {}
    for group in part:
        found.setdefault(tell(group, axes), []).append(group)
    return sorted(found.values(), key=lambda row: (max(map(size, row)), row[0].method))


def row_label(row: list[Group], options: Sequence[str], part: Sequence[Group]) -> Cell:
    """The method, with those options that its rows in this table differ in."""
    alike = [group for group in part if group.method == row[0].method]
    names = short_names(options)
    shown = [f"{names[o]} {row[0].axes[o].label}" for o in options if count(alike, [o]) > 1]
    text = ", ".join([row[0].method, *shown])
    return Cell(text, text)


def _accuracies(row: list[Group], across: Iterable[tuple[str, ...]], axes: Sequence[str]) -> list[Cell]:
    by_column = {_labels(axes)(group): group for group in row}
    assert len(by_column) == len(row), f"two groups in one cell: {[group.label for group in row]}"
    return [accuracy_cell(by_column[key]) if key in by_column else EMPTY for key in across]


def accuracy_cell(group: Group) -> Cell:
    found = group.accuracy
    value = {"mean": found.mean, "std": found.std, "seeds": found.seeds, "group": group.label}
    return Cell(str(found), value)


def label_cell(group: Group, axis: str) -> Cell:
    value = group.axes[axis]
    return Cell(value.label, value.label if value.number is None else value.number)


def hours_cell(group: Group) -> Cell:
    hours = group.simulated_hours
    return EMPTY if hours is None else Cell(f"{hours:,.4g}", hours)


def epsilon_cell(group: Group) -> Cell:
    if not group.privacy:
        return EMPTY
    return (
        Cell("no guarantee", "no guarantee") if group.epsilon is None else Cell(f"{group.epsilon:.4g}", group.epsilon)
    )


def title_of(name: str, grouping: Grouping, part: Sequence[Group], without: set[str], extra: Sequence[str] = ()) -> str:
    """The name, and where the table's groups stand on the settings that differ elsewhere."""
    names = short_names(grouping.settings)
    parts = []
    for axis in (*extra, *grouping.settings):
        if axis in without or count(grouping.groups, [axis]) < 2:
            continue
        kind = PARTITION_KIND if axis == PARTITION and count(part, [PARTITION]) > 1 else axis
        if count(part, [kind]) == 1:
            label = part[0].axes[kind].label
            parts.append(label if axis in SPEAKING else f"{names[axis]} {label}")
    return f"{name}: {', '.join(parts)}" if parts else name


def varying_along(grouping: Grouping, part: Sequence[Group], axes: Iterable[str]) -> str:
    """What differs between a table's groups and is not told by these axes, by its columns or by its rows."""
    told = {key for axis in axes for key in grouping.told[axis]} | {"backbone.pretrained"}
    values: dict[str, set[str]] = {}
    for group in part:
        for key, value in group.keys.items():
            values.setdefault(key, set()).add(repr(value))
    keys = [k for k, found in values.items() if len(found) > 1 and k not in told and not k.startswith("method.")]
    return f"Varies along with these: {', '.join(sorted(keys))}." if keys else ""


def millions(parameters: int) -> str:
    """`0.08M`, with two digits at least."""
    number = parameters / 1e6
    return f"{number:,.2f}M" if number >= 0.01 else f"{number:.2g}M"


def _span(texts: Sequence[str]) -> str:
    """`2.35`, or `0.05-2.35`: a head's size follows the data set's classes."""
    ends = list(dict.fromkeys((texts[0], texts[-1])))
    return "-".join(ends)
