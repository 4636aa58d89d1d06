"""A table of a report: columns, rows and cells, independent of how the table is written."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fedpeft_dist.reports.axes import Axis, short_names, show
from fedpeft_dist.reports.groups import Group

NEVER, ALWAYS = 0, 9
"""Values of `Column.drop` for a column that a terminal always keeps, and for one that a terminal never shows."""


@dataclass(frozen=True)
class Cell:
    text: str
    value: Any = None
    """The value for --json and CSV: a number or boolean of its own type, a text, a list of the least and the largest
    number, or a dict of mean, std, seeds and group."""

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
    """On a terminal that is too narrow, columns with the highest numbers go first."""


@dataclass(frozen=True)
class Table:
    kind: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def text_cell(text: str) -> Cell:
    return Cell(text, text)


def count_cell(number: int) -> Cell:
    return Cell(f"{number:,}", number)


def accuracy_cell(group: Group) -> Cell:
    found = group.accuracy
    value = {"mean": found.mean, "std": found.std, "seeds": found.seeds, "group": group.label}
    return Cell(str(found), value)


def axis_cell(group: Group, axis: Axis) -> Cell:
    value = group.axes[axis.name]
    return Cell(show(value), value if isinstance(value, int | float) else show(value))


def axis_headings(axes: Iterable[Axis]) -> list[str]:
    return list(short_names(axis.name for axis in axes).values())


def epsilon_cell(group: Group) -> Cell:
    if not group.privacy:
        return EMPTY
    return text_cell("no guarantee") if group.epsilon is None else Cell(f"{group.epsilon:.4g}", group.epsilon)


def range_cell(values: Iterable[float], form: Callable[[float], str]) -> Cell:
    """One number, or the least and the largest: `0.05-2.35`. Numbers that look the same are shown once."""
    ordered = sorted(values)
    if not ordered:
        return EMPTY
    ends = list(dict.fromkeys((ordered[0], ordered[-1])))
    return Cell("-".join(dict.fromkeys(map(form, ends))), ends if len(ends) > 1 else ends[0])


def millions(number: float) -> str:
    """A count as `0.08M`, with at least two digits."""
    return f"{number / 1e6:,.2f}M" if number >= 1e4 else f"{number / 1e6:.2g}M"
