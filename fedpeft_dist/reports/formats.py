"""A report's tables on a terminal, in markdown, in CSV and in JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from fedpeft_dist.reports.tables import ALWAYS, NEVER, Table

MAX_WORD = 24
"""Characters of a name that stay on one line of a terminal."""


def rich_tables(table: Table, width: int) -> Iterator[RichTable]:
    """The table without what can be missed where it is too wide, and in several pieces where it still is."""
    columns = [index for index, column in enumerate(table.columns) if column.drop != ALWAYS]
    left_out = []
    for index in sorted(columns, key=lambda index: table.columns[index].drop, reverse=True):
        if _width(table, columns) > width and table.columns[index].drop > NEVER:
            columns.remove(index)
            left_out.append(table.columns[index].heading)
    note = table.note
    if left_out:
        note = f"{note} Too wide for here: {', '.join(left_out)}.".strip()
    # Pieces repeat what names a row: all words, where there is room for a number beside them.
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
    # Given out here: rich itself would take from columns that have nothing to spare.
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
    """Words break at spaces, and anywhere if they are very long; numbers do not, but their heading does."""
    heading, *cells = _texts(table, index)
    parts = [*heading.split(), *(part for cell in cells for part in cell.split())]
    words = min(max(map(len, parts), default=1), MAX_WORD)
    return words if table.columns[index].is_text else max(words, *map(len, cells), 1)


def _texts(table: Table, index: int) -> list[str]:
    return [table.columns[index].heading, *(row[index].text for row in table.rows)]


def markdown_table(table: Table) -> str:
    lines = ["| " + " | ".join(escape_markdown(column.heading) for column in table.columns) + " |"]
    lines.append("|" + "|".join(" --- " if column.is_text else " ---: " for column in table.columns) + "|")
    lines += ["| " + " | ".join(escape_markdown(cell.text) for cell in row) + " |" for row in table.rows]
    return "\n".join(lines) + "\n" + (f"\n{escape_markdown(table.note)}\n" if table.note else "")


def csv_text(table: Table) -> str:
    """Values as they are, not rounded; mean, standard deviation and number of seeds in columns of their own."""
    is_spread = [any(isinstance(row[index].value, dict) for row in table.rows) for index in range(len(table.columns))]
    headings = [
        (column.heading, "std") if wide else (column.heading,) for column, wide in zip(table.columns, is_spread)
    ]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([heading for found in headings for heading in found])
    for row in table.rows:
        values: list[Any] = []
        for cell, wide in zip(row, is_spread):
            found = cell.value if not wide else cell.value or {}
            values += [found.get("mean"), found.get("std")] if wide else [found]
        writer.writerow(["" if value is None else value for value in values])
    return file.getvalue()


def json_table(table: Table) -> dict[str, Any]:
    return {
        "kind": table.kind,
        "title": table.title,
        "note": table.note,
        "columns": [column.heading for column in table.columns],
        "rows": [[cell.value for cell in row] for row in table.rows],
    }


def escape_markdown(text: str) -> str:
    """A text that markdown leaves as it is, on one line."""
    for character, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`"), ("*", "\\*")):
        text = text.replace(character, safe)
    return " ".join(text.split())
