"""The tables of all groups and of unfinished runs, and the tables that compare groups: bytes, axes, time.

A cell of a comparison is one group, never a mean over several. A row's label gives the group's values on all axes but
the compared one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from fedpeft_dist.reports import tables
from fedpeft_dist.reports.axes import CLIENTS, MAX_TRAIN, PARTICIPATION, Axis, in_order, short_names
from fedpeft_dist.reports.groups import Group, Grouping
from fedpeft_dist.reports.runs import Run
from fedpeft_dist.reports.tables import Cell, Column, Table, group_table
from fedpeft_dist.tracking.run_directory import COMPLETE

MAX_AXES = 16
"""The table of all groups has columns for so many axes; the CSV of all runs has every key."""
SHARES = (0.5, 0.8, 0.95)
"""Shares of the best accuracy that any group of a table has reached."""
TITLES = {
    CLIENTS: "Client stability",
    PARTICIPATION: "Participation",
    "partition": "Data distribution",
    "backbone": "Backbone",
    "privacy": "Privacy",
    MAX_TRAIN: "Data scale",
}


def main_table(grouping: Grouping) -> Table:
    """One row a group; the group with the fewest bytes comes first."""
    groups = grouping.groups
    columns = [
        tables.METHOD,
        *tables.axis_columns(grouping.varying[:MAX_AXES], grouping),
        tables.column_of("trained parameters", "trained_parameters", "{:,}"),
        tables.column_of("clients a round", "cohort", "{:,}", drop=1),
        tables.column_of("MiB per client and round", "mib_per_client", "{:,.4f}", drop=3),
        tables.column_of("MiB a round", "mib_per_round", "{:,.3f}"),
        tables.column_of("total MiB", "mib_total", "{:,.2f}", drop=4),
        tables.column_of("share of full's bytes", "share_of_full", "{:.2%}", drop=2),
    ]
    if any(group.simulated_hours is not None for group in groups):
        columns.append(tables.column_of("simulated hours", "simulated_hours", "{:,.4g}"))
    if any(group.privacy for group in groups):
        columns.append(tables.EPSILON)
    columns += [tables.ACCURACY, tables.column_of("seeds", "num_seeds", "{:,}")]
    return group_table("groups", "All groups", columns, groups, grouping.note)


def unfinished_table(runs: Sequence[Run]) -> Table:
    columns = [Column("run", True), Column("state", True), Column("rounds done"), Column("what is wrong", True)]
    rows = []
    for run in runs:
        if run.state != COMPLETE or run.problem:
            cells = [tables.make_cell(text) for text in (run.name, run.state, run.problem)]
            rows.append([*cells[:2], tables.make_cell(run.rounds_done, "{:,}"), *cells[2:]])
    if any(run.problem for run in runs):
        return Table("unfinished", "Unfinished or damaged runs", columns, rows)
    return Table("unfinished", "Unfinished runs", columns[:3], [row[:3] for row in rows])


def comparison_tables(grouping: Grouping) -> list[Table]:
    """By communication where there are several groups, then along every axis but the data sets."""
    headings = short_names(axis.name for axis in grouping.telling)
    found = [_communication_table(grouping)] if len(grouping.groups) > 1 else []
    for axis in grouping.telling:
        # A row with a single value compares nothing and is left out.
        rows = [row for row in grouping.rows(grouping.groups, [axis]) if len(row) > 1]
        if rows and axis != grouping.data_axis:
            title = TITLES.get(axis.name, f"By {headings[axis.name]}")
            found.append(Table(axis.name, title, *_comparison(grouping, axis, rows)))
    return found


def _communication_table(grouping: Grouping) -> Table:
    """The paper's table: tuned parameters times clients, MiB a round, and accuracy in a column for each data set.

    The row with the fewest bytes comes first.
    """

    def tuned(row: Sequence[Group]) -> Cell:
        parameters = tables.range_cell([group.trained_parameters for group in row], _millions)
        return tables.make_cell(f"{parameters.text} x {row[0].cohort:,}")

    def sent(row: Sequence[Group]) -> Cell:
        return tables.range_cell([group.mib_per_round for group in row], "{:,.2f}".format)

    axis = grouping.data_axis
    rows = sorted(grouping.rows(grouping.groups, [axis]), key=lambda row: max(group.mib_per_round for group in row))
    columns = [(Column("tuned parameters x clients", True), tuned), (Column("MiB a round"), sent)]
    return Table("communication", "Communication", *_comparison(grouping, axis, rows, columns))


def _millions(number: float) -> str:
    """A count as `0.08M`, with at least two digits."""
    return f"{number / 1e6:,.2f}M" if number >= 1e4 else f"{number / 1e6:.2g}M"


Rows: TypeAlias = Sequence[Sequence[Group]]
RowColumn: TypeAlias = tuple[Column, Callable[[Sequence[Group]], Cell]]


def _comparison(grouping: Grouping, axis: Axis | None, rows: Rows, more: Sequence[RowColumn] = ()) -> tuple:
    """A table's columns, rows and note. It has one column for each value on an axis, after the label and some more.

    Without an axis there is one for the data set. Accuracies over fewer seeds than others are marked.
    """
    values = {grouping.value(group, axis): group.axes[axis.name] if axis else "" for group in grouping.groups}
    across = sorted(values, key=lambda text: in_order(values[text]))
    seeds = [group.num_seeds for row in rows for group in row]
    cells = []
    for row in rows:
        found = {grouping.value(group, axis): tables.accuracy_cell(group, max(seeds)) for group in row}
        assert len(found) == len(row), f"two groups in one cell: {[group.label for group in row]}"
        label = tables.make_cell(grouping.label(row[0], [axis]))
        cells.append([label, *(cell(row) for _, cell in more), *(found.get(text, tables.EMPTY) for text in across)])
    columns = [Column("method", True), *(column for column, _ in more), *map(Column, across)]
    fewer = f" n: seeds, {max(seeds)} where none is told." if min(seeds) < max(seeds) else ""
    return columns, cells, f"{grouping.note}{fewer}".strip()


def time_tables(grouping: Grouping) -> list[Table]:
    """Rounds and simulated hours until a share of the best accuracy is reached: one table for each data set.

    A table has the groups with simulated time, and the same targets for all of them.
    """
    found = []
    axes = tables.axis_columns([axis for axis in grouping.telling if axis != grouping.data_axis], grouping)
    for data_set, alike in grouping.by_data_set().items():
        groups = [group for row in grouping.rows(alike) for group in row if group.is_timed]
        if len(groups) < 2:
            continue
        best = max(point.mean for group in groups for point in group.curve)
        reached = [
            (Column(f"{unit} to {share:.0%}"), partial(_reached, share * best, name, form))
            for share in SHARES
            for unit, name, form in (("rounds", "round", "{:,}"), ("hours", "hours", "{:,.4g}"))
        ]
        note = (
            f"Shares are of {best:.4f}, the best accuracy here, the mean over seeds at some evaluation; what counts is "
            "the first evaluation that is there. Hours are simulated, the mean over seeds; a dash: never."
        )
        title = f"Time to accuracy: {data_set}" if grouping.data_axis else "Time to accuracy"
        found.append(group_table("time", title, [tables.METHOD, *axes, *reached], groups, note))
    return found


def _reached(target: float, name: str, form: str, group: Group) -> Cell:
    point = next((point for point in group.curve if point.mean >= target), None)
    return Cell("-") if point is None else tables.make_cell(getattr(point, name), form)
