"""How long a group takes to be good: rounds and simulated hours until a share of the best accuracy is reached."""

from __future__ import annotations

from fedpeft_dist.reports.groups import Group, Grouping, Statistic, count
from fedpeft_dist.reports.labels import PARTICIPATION
from fedpeft_dist.reports.runs import Point
from fedpeft_dist.reports.tables import (
    Cell,
    Column,
    Table,
    label_cell,
    parts,
    row_label,
    title_of,
    varying_along,
)

SHARES = (0.5, 0.8, 0.95)
"""Of the best accuracy that any group of a table has had."""


def time_tables(grouping: Grouping) -> list[Table]:
    """Over the groups whose clients take simulated time; the same accuracies are asked of all groups of a table."""
    tables = []
    timed = [group for group in grouping.groups if _is_timed(group)]
    for part in parts(timed, grouping, PARTICIPATION):
        if len(part.groups) < 2:
            continue
        curves = {id(group): group.curve() for group in part.groups}
        best = max(found.mean for curve in curves.values() for _, found in curve)
        conditions = [PARTICIPATION] if count(part.groups, [PARTICIPATION]) > 1 else []
        columns = [Column("method", True), *(Column(axis, True) for axis in conditions)]
        columns += [Column(f"{unit} to {share:.0%}") for share in SHARES for unit in ("rounds", "hours")]
        rows = []
        for row in part.rows:
            for group in sorted(row, key=lambda group: group.axes[PARTICIPATION].order):
                cells = [row_label(row, part.options, part.groups), *(label_cell(group, axis) for axis in conditions)]
                for share in SHARES:
                    cells += _reached(curves[id(group)], share * best)
                rows.append(tuple(cells))
        note = (
            f"Shares are of {best:.4f}, the best accuracy here, the mean over seeds at some evaluation; what counts is "
            "the first evaluation that is there. Hours are simulated, the mean over seeds; a dash: never."
        )
        along = varying_along(grouping, part.groups, (PARTICIPATION, *part.contexts, *part.options))
        title = title_of("Time to accuracy", grouping, part.groups, {PARTICIPATION})
        tables.append(Table("time", title, tuple(columns), tuple(rows), " ".join(filter(None, [note, along]))))
    return tables


def _is_timed(group: Group) -> bool:
    curve = group.curve()
    return bool(curve) and all(point.hours is not None for point, _ in curve)


def _reached(curve: list[tuple[Point, Statistic]], target: float) -> tuple[Cell, Cell]:
    for point, found in curve:
        if found.mean >= target:
            return Cell(f"{point.round:,}", point.round), Cell(f"{point.hours:,.4g}", point.hours)
    return Cell("-"), Cell("-")
