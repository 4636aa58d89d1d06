"""How long a group takes to be good: rounds and simulated hours until a share of the best accuracy is reached."""

from fedpeft_dist.reports.groups import Group, Grouping, Statistic
from fedpeft_dist.reports.runs import Point
from fedpeft_dist.reports.table import Cell, Column, Table, axis_cell, axis_headings, count_cell, text_cell

SHARES = (0.5, 0.8, 0.95)
"""Shares of the best accuracy that any group of a table has reached."""


def time_tables(grouping: Grouping) -> list[Table]:
    """One table for each data set, over the groups with simulated time. All groups of a table have the same targets."""
    tables = []
    axes = [axis for axis in grouping.telling if axis != grouping.data_axis]
    columns = [Column("method", True), *(Column(heading, True) for heading in axis_headings(axes))]
    columns += [Column(f"{unit} to {share:.0%}") for share in SHARES for unit in ("rounds", "hours")]
    for data_set, groups in grouping.by_data_set().items():
        curves = {group: group.curve() for row in grouping.rows(groups, []) for group in row if _is_timed(group)}
        if len(curves) < 2:
            continue
        best = max(found.mean for curve in curves.values() for _, found in curve)
        rows = []
        for group, curve in curves.items():
            row = [text_cell(group.method), *(axis_cell(group, axis) for axis in axes)]
            rows.append((*row, *(cell for share in SHARES for cell in _reached(curve, share * best))))
        note = (
            f"Shares are of {best:.4f}, the best accuracy here, the mean over seeds at some evaluation; what counts is "
            "the first evaluation that is there. Hours are simulated, the mean over seeds; a dash: never."
        )
        title = f"Time to accuracy: {data_set}" if grouping.data_axis else "Time to accuracy"
        tables.append(Table("time", title, tuple(columns), tuple(rows), note))
    return tables


def _is_timed(group: Group) -> bool:
    curve = group.curve()
    return bool(curve) and all(point.hours is not None for point, _ in curve)


def _reached(curve: list[tuple[Point, Statistic]], target: float) -> tuple[Cell, Cell]:
    for point, found in curve:
        if found.mean >= target:
            return count_cell(point.round), Cell(f"{point.hours:,.4g}", point.hours)
    return Cell("-"), Cell("-")
