"""A table of a report, and how it is written: on a terminal of any width, in markdown, in CSV and in JSON."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from fedpeft_dist.reports.axes import Axis, short_names, show
from fedpeft_dist.reports.groups import Group, Grouping

NEVER, ALWAYS = 0, 9
"""Values of `Column.drop` for a column that a terminal always keeps, and for one that a terminal never shows."""
MAX_WORD = 24
"""A terminal keeps so many characters of a name on one line."""


class Cell(NamedTuple):
    text: str
    value: Any = None
    """The value for --json and CSV: a number or boolean of its own type, a text, a list of the least and the largest
    number, or a dict of mean, std, seeds and group."""


class Column(NamedTuple):
    heading: str
    is_text: bool = False
    drop: int = NEVER
    """On a terminal that is too narrow, columns with the highest numbers go first."""


class Table(NamedTuple):
    kind: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


EMPTY = Cell("")
GroupColumn: TypeAlias = tuple[Column, Callable[[Group], Cell]]
"""A column, and the cell that a group has in it."""


def group_table(kind: str, title: str, columns: Sequence[GroupColumn], groups: Iterable[Group], note: str) -> Table:
    """One row a group."""
    rows = [[cell(group) for _, cell in columns] for group in groups]
    return Table(kind, title, [column for column, _ in columns], rows, note)


def make_cell(value: float | str | None, form: str = "{}") -> Cell:
    return EMPTY if value is None else Cell(form.format(value), value)


def range_cell(values: Iterable[float], form: Callable[[float], str]) -> Cell:
    """One number, or the least and the largest: `0.05-2.35`. Numbers that look the same are shown once."""
    ordered = sorted(values)
    ends = list(dict.fromkeys((*ordered[:1], *ordered[-1:])))
    return Cell("-".join(dict.fromkeys(map(form, ends))), ends if len(ends) > 1 else ends[0]) if ends else EMPTY


def accuracy_cell(group: Group, most_seeds: int = 0) -> Cell:
    """Marks an accuracy over fewer seeds than the most."""
    mark = f" (n={group.accuracy.seeds})" if group.accuracy.seeds < most_seeds else ""
    return Cell(f"{group.accuracy}{mark}", {**group.accuracy._asdict(), "group": group.label})


def _epsilon_cell(group: Group) -> Cell:
    is_unknown = group.privacy and group.epsilon is None
    return make_cell("no guarantee") if is_unknown else make_cell(group.epsilon, "{:.4g}")


def column_of(heading: str, name: str, form: str = "{}", is_text: bool = False, drop: int = NEVER) -> GroupColumn:
    """A column of an attribute of groups."""
    return Column(heading, is_text, drop), lambda group: make_cell(getattr(group, name), form)


METHOD = column_of("method", "method", is_text=True)
EPSILON: GroupColumn = (Column("epsilon"), _epsilon_cell)
ACCURACY: GroupColumn = (Column("final accuracy"), accuracy_cell)


def axis_columns(axes: Sequence[Axis], grouping: Grouping) -> list[GroupColumn]:
    """A terminal shows the telling axes alone."""
    headings = short_names(axis.name for axis in axes)
    drops = [NEVER if axis in grouping.telling else ALWAYS for axis in axes]
    return [(Column(headings[a.name], True, drop), partial(_axis_cell, a.name)) for a, drop in zip(axes, drops)]


def _axis_cell(name: str, group: Group) -> Cell:
    value = group.axes[name]
    return Cell(show(value), value if isinstance(value, int | float) else show(value))


def rich_tables(table: Table, width: int) -> Iterator[RichTable]:
    """The table in a terminal's width: without its less important columns if necessary, then in several pieces."""
    columns = [index for index, column in enumerate(table.columns) if column.drop != ALWAYS]
    left_out = []
    for index in sorted(columns, key=lambda index: table.columns[index].drop, reverse=True):
        if _width(table, columns) > width and table.columns[index].drop > NEVER:
            columns.remove(index)
            left_out.append(table.columns[index].heading)
    note = f"{table.note} Too wide for here: {', '.join(left_out)}.".strip() if left_out else table.note
    # Every piece repeats the columns that name a row: all text columns, if a number has room beside them.
    head = [index for index in columns if table.columns[index].is_text]
    rest = [index for index in columns if index not in head]
    if rest and max(_width(table, [*head, index]) for index in rest) > width:
        head, rest = columns[:1], columns[1:]
    while True:
        fitting = (n for n in range(1, len(rest) + 1) if _width(table, [*head, *rest[:n]]) <= width)
        number = max(fitting, default=1)
        piece, rest = rest[:number], rest[number:]
        shown = sorted([*head, *piece])
        made = RichTable(box=box.SIMPLE_HEAD, padding=0, title=Text(table.title), title_justify="left")
        made.caption, made.caption_justify = Text(note, style="dim") if note and not rest else None, "left"
        # Spare width is shared out here, because rich would take width from columns that have none to spare.
        spare = max(width - _width(table, shown), 0)
        for index in shown:
            column, (least, natural) = table.columns[index], _widths(table, index)
            more = min(natural - least, spare)
            spare -= more
            justify = "left" if column.is_text else "right"
            made.add_column(Text(column.heading), justify=justify, overflow="fold", width=least + more)
        for row in table.rows:
            made.add_row(*(Text(row[index].text) for index in shown))
        yield made
        if not rest:
            return


def _width(table: Table, columns: Sequence[int]) -> int:
    return sum(_widths(table, index)[0] + 1 for index in columns) + 1


def _widths(table: Table, index: int) -> tuple[int, int]:
    """A column's least width and its natural one.

    Text breaks at spaces, and very long words break anywhere. Numbers never break, but their headings do.
    """
    texts = [table.columns[index].heading, *(row[index].text for row in table.rows)]
    words = min(max((len(word) for text in texts for word in text.split()), default=1), MAX_WORD)
    least = words if table.columns[index].is_text else max(words, *map(len, texts[1:]), 1)
    return least, max(map(len, texts))


def markdown_table(table: Table) -> str:
    lines = [[escape_markdown(column.heading) for column in table.columns]]
    lines.append(["---" if column.is_text else "---:" for column in table.columns])
    lines += [[escape_markdown(cell.text) for cell in row] for row in table.rows]
    note = f"\n{escape_markdown(table.note)}\n" if table.note else ""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + note


def escape_markdown(text: str) -> str:
    """A text on one line, in which markdown changes nothing."""
    for character, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`"), ("*", "\\*")):
        text = text.replace(character, safe)
    return " ".join(text.split())


def csv_table(table: Table) -> str:
    """Unrounded values; a standard deviation has a column of its own beside its mean."""
    lines: list[list[Any]] = [[], *([] for _ in table.rows)]
    for index, column in enumerate(table.columns):
        values = [row[index].value for row in table.rows]
        has_spread = any(isinstance(value, dict) for value in values)
        lines[0] += [column.heading, "std"] if has_spread else [column.heading]
        for line, value in zip(lines[1:], values):
            line += [(value or {}).get(key) for key in ("mean", "std")] if has_spread else [value]
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


def json_table(table: Table) -> dict[str, Any]:
    columns, rows = [column.heading for column in table.columns], [[cell.value for cell in row] for row in table.rows]
    return {**table._asdict(), "columns": columns, "rows": rows}
