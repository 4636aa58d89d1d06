"""The tables that compare groups: by communication, and along every axis.

A cell is one group, never a mean over several. A row's label gives the group's values on all axes but the compared one.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from fedpeft_dist.reports.axes import CLIENTS, MAX_TRAIN, PARTICIPATION, Axis, in_order, show
from fedpeft_dist.reports.groups import Group, Grouping
from fedpeft_dist.reports.table import (
    EMPTY,
    Cell,
    Column,
    Table,
    accuracy_cell,
    axis_headings,
    millions,
    range_cell,
    text_cell,
)

TITLES = {
    CLIENTS: "Client stability",
    PARTICIPATION: "Participation",
    "partition": "Data distribution",
    "backbone": "Backbone",
    "privacy": "Privacy",
    MAX_TRAIN: "Data scale",
}


def comparison_tables(grouping: Grouping) -> list[Table]:
    tables = [_communication_table(grouping)] if len(grouping.groups) > 1 else []
    headings = axis_headings(grouping.telling)
    tables += [
        _axis_table(grouping, *pair) for pair in zip(grouping.telling, headings) if pair[0] != grouping.data_axis
    ]
    return [_mark_fewer_seeds(table) for table in tables if table.rows]


def _communication_table(grouping: Grouping) -> Table:
    """The paper's table: tuned parameters times clients, MiB a round, and accuracy in a column for each data set.

    The row with the fewest bytes comes first.
    """
    without = [grouping.data_axis] if grouping.data_axis else []
    data_sets = list(grouping.by_data_set())
    rows = []
    for row in sorted(grouping.rows(grouping.groups, without), key=lambda row: max(g.mib_per_round for g in row)):
        tuned = range_cell([group.parameters for group in row], millions)
        tuned = text_cell(f"{tuned.text} x {row[0].cohort:,}")
        sent = range_cell([group.mib_per_round for group in row], "{:,.2f}".format)
        rows.append((_label_cell(grouping, row, without), tuned, sent, *_across(row, data_sets, grouping.data_set)))
    columns = [Column("method", True), Column("tuned parameters x clients", True), Column("MiB a round")]
    columns += [Column(name) for name in data_sets]
    return Table("communication", "Communication", tuple(columns), tuple(rows), grouping.note)


def _axis_table(grouping: Grouping, axis: Axis, heading: str) -> Table:
    """One column for each value on an axis. A row with a single value compares nothing and is left out."""

    def value_of(group: Group) -> str:
        return show(group.axes[axis.name])

    values = {value_of(group): group.axes[axis.name] for group in grouping.groups}
    across = sorted(values, key=lambda text: in_order(values[text]))
    rows = [row for row in grouping.rows(grouping.groups, [axis]) if len(row) > 1]
    cells = [(_label_cell(grouping, row, [axis]), *_across(row, across, value_of)) for row in rows]
    columns = (Column("method", True), *(Column(value) for value in across))
    return Table(axis.name, TITLES.get(axis.name, f"By {heading}"), columns, tuple(cells), grouping.note)


def _label_cell(grouping: Grouping, row: Sequence[Group], without: Sequence[Axis]) -> Cell:
    return text_cell(grouping.label(row[0], without))


def _across(row: Sequence[Group], columns: Sequence[str], column_of: Callable[[Group], str]) -> list[Cell]:
    by_column = {column_of(group): group for group in row}
    assert len(by_column) == len(row), f"two groups in one cell: {[group.label for group in row]}"
    return [accuracy_cell(by_column[name]) if name in by_column else EMPTY for name in columns]


def _mark_fewer_seeds(table: Table) -> Table:
    """Marks accuracies over fewer seeds than the table's other accuracies."""
    seeds = [cell.value["seeds"] for row in table.rows for cell in row if isinstance(cell.value, dict)]
    most = max(seeds)
    if min(seeds) == most:
        return table

    def marked(cell: Cell) -> Cell:
        few = isinstance(cell.value, dict) and cell.value["seeds"] < most
        return replace(cell, text=f"{cell.text} (n={cell.value['seeds']})") if few else cell

    rows = tuple(tuple(marked(cell) for cell in row) for row in table.rows)
    return replace(table, rows=rows, note=f"{table.note} n: seeds, {most} where none is told.".strip())
