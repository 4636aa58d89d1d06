"""A report's tables in markdown, in CSV and in JSON."""

import csv
import io
from typing import Any

from fedpeft_dist.reports.table import Table


def markdown_table(table: Table) -> str:
    lines = ["| " + " | ".join(escape_markdown(column.heading) for column in table.columns) + " |"]
    lines.append("|" + "|".join(" --- " if column.is_text else " ---: " for column in table.columns) + "|")
    lines += ["| " + " | ".join(escape_markdown(cell.text) for cell in row) + " |" for row in table.rows]
    return "\n".join(lines) + "\n" + (f"\n{escape_markdown(table.note)}\n" if table.note else "")


def csv_text(table: Table) -> str:
    """Unrounded values; a standard deviation has a column of its own beside its mean."""
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
    """A text on one line, in which markdown changes nothing."""
    for character, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`"), ("*", "\\*")):
        text = text.replace(character, safe)
    return " ".join(text.split())
