"""A report's tables on a terminal of any width."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from fedpeft_dist.reports.table import ALWAYS, NEVER, Table

MAX_WORD = 24
"""A terminal keeps so many characters of a name on one line."""


def rich_tables(table: Table, width: int) -> Iterator[RichTable]:
    """The table in a terminal's width: without its less important columns if necessary, then in several pieces."""
    columns = [index for index, column in enumerate(table.columns) if column.drop != ALWAYS]
    left_out = []
    for index in sorted(columns, key=lambda index: table.columns[index].drop, reverse=True):
        if _width(table, columns) > width and table.columns[index].drop > NEVER:
            columns.remove(index)
            left_out.append(table.columns[index].heading)
    note = table.note
    if left_out:
        note = f"{note} Too wide for here: {', '.join(left_out)}.".strip()
    # Every piece repeats the columns that name a row: all text columns, if a number has room beside them.
    head = [index for index in columns if table.columns[index].is_text]
    rest = [index for index in columns if index not in head]
    if rest and _width(table, [*head, max(rest, key=lambda index: _least_width(table, index))]) > width:
        head, rest = columns[:1], columns[1:]
    while True:
        fitting = (n for n in range(1, len(rest) + 1) if _width(table, [*head, *rest[:n]]) <= width)
        number = max(fitting, default=1)
        piece, rest = rest[:number], rest[number:]
        yield _rich_table(table, sorted([*head, *piece]), "" if rest else note, width)
        if not rest:
            return


def _rich_table(table: Table, columns: Sequence[int], note: str, width: int) -> RichTable:
    made = RichTable(box=box.SIMPLE_HEAD, padding=0, title=Text(table.title), title_justify="left")
    made.caption, made.caption_justify = Text(note, style="dim") if note else None, "left"
    # Spare width is shared out here, because rich would take width from columns that have none to spare.
    spare = max(width - _width(table, columns), 0)
    for index in columns:
        column = table.columns[index]
        least, natural = _least_width(table, index), max(map(len, _texts(table, index)))
        more = min(natural - least, spare)
        spare -= more
        justify = "left" if column.is_text else "right"
        made.add_column(Text(column.heading), justify=justify, overflow="fold", width=least + more)
    for row in table.rows:
        made.add_row(*(Text(row[index].text) for index in columns))
    return made


def _width(table: Table, columns: Sequence[int]) -> int:
    return sum(_least_width(table, index) + 1 for index in columns) + 1


def _least_width(table: Table, index: int) -> int:
    """Text breaks at spaces, and very long words break anywhere. Numbers never break, but their headings do."""
    heading, *cells = _texts(table, index)
    parts = [*heading.split(), *(part for cell in cells for part in cell.split())]
    words = min(max(map(len, parts), default=1), MAX_WORD)
    return words if table.columns[index].is_text else max(words, *map(len, cells), 1)


def _texts(table: Table, index: int) -> list[str]:
    return [table.columns[index].heading, *(row[index].text for row in table.rows)]
