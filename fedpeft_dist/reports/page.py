"""report.html: the report as one page that needs nothing but a browser.

The tables are plain HTML, made here. The curves and the partitions travel as JSON; the scripts draw them, sort and
filter. The page makes no request at all (its Content-Security-Policy forbids it). Everything in it is escaped, because
names of runs come from folders, and folders can have any name.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from fedpeft_dist.reports.groups import Group
from fedpeft_dist.reports.lines import Line
from fedpeft_dist.reports.partitions import partition_pictures
from fedpeft_dist.reports.privacy import EpsilonPicture
from fedpeft_dist.reports.report import Report
from fedpeft_dist.reports.table import Cell, Table

MAX_POINTS = 200
"""A longer curve is thinned out to so many points."""
SCRIPTS = ("page.js", "charts.js", "curves.js", "epsilon.js", "partitions.js")


def page_text(report: Report) -> str:
    pictures, left_out = partition_pictures(report.runs)
    data = {
        "series": [line_data(line) for line in report.lines],
        "epsilon": [epsilon_data(picture) for picture in report.epsilon_pictures],
        "partitions": pictures,
    }
    slots = {
        "title": html.escape(f"Runs below {report.name}"),
        "counts": html.escape(_counts(report)),
        "style": _asset("report.css"),
        "script": "\n".join(map(_asset, SCRIPTS)),
        "data": script_json(data),
        "none_yet": "" if report.main.rows else "No run is complete yet.",
        "groups": html_table(report.main, "groups", selectable=[group.label for group in report.grouping.groups]),
        "privacy": html_table(report.privacy) if report.privacy.rows else "",
        "comparisons": "\n".join(_section(table) for table in report.comparisons),
        "left_out": f"{left_out} more partitions are not shown." if left_out else "",
        "unfinished": _section(report.unfinished) if report.unfinished.rows else "",
    }
    # One pass fills all slots, so a slot's text is never searched for another slot.
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: slots[slot[1]], _asset("report.html"))


def html_table(table: Table, identity: str = "", selectable: Sequence[str] = ()) -> str:
    """A table with headings to sort by.

    Args:
        selectable: the rows' names, for a box to tick in each row.
    """
    headings = [
        f'<th scope="col" class="{"text" if column.is_text else "number"}" aria-sort="none">'
        f'<button type="button">{html.escape(column.heading)}</button></th>'
        for column in table.columns
    ]
    if selectable:
        headings.insert(0, '<th scope="col"><span class="hidden">highlight</span></th>')
    lines = [f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(table.title)}">']
    lines.append(f'<table class="sortable"{f" id={identity}" if identity else ""}>')
    lines.append(f"<caption>{html.escape(table.title)}</caption>")
    lines.append(f"<thead><tr>{''.join(headings)}</tr></thead><tbody>")
    for number, row in enumerate(table.rows):
        cells = [_cell(cell, table.columns[i].is_text, first=i == 0) for i, cell in enumerate(row)]
        if selectable:
            label = html.escape(f"highlight {selectable[number]}")
            cells.insert(0, f'<td><label class="pick"><input type="checkbox" aria-label="{label}"><i></i></label></td>')
        lines.append(f'<tr data-row="{number}">{"".join(cells)}</tr>')
    lines.append("</tbody></table></div>")
    if table.note:
        lines.append(f'<p class="note">{html.escape(table.note)}</p>')
    return "\n".join(lines)


def script_json(data: Any) -> str:
    """JSON that can neither end its script element nor start a comment there."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def line_data(line: Line) -> dict[str, Any]:
    curve = line.curve
    if len(curve) > MAX_POINTS:
        curve = [curve[round(number * (len(curve) - 1) / (MAX_POINTS - 1))] for number in range(MAX_POINTS)]
    hours = [point.hours for point, _ in curve]
    return {
        "label": line.label,
        "method": line.method,
        "state": line.state,
        "seeds": line.seeds,
        "round": [point.round for point, _ in curve],
        "mib": [_digits(point.mib_sent) for point, _ in curve],
        "hours": [] if None in hours else [_digits(value) for value in hours],
        "mean": [_digits(found.mean) for _, found in curve],
        "std": [_digits(found.std or 0.0) for _, found in curve],
    }


def epsilon_data(picture: EpsilonPicture) -> dict[str, Any]:
    """A picture's points by line: [epsilon, mean, std, label]. The epsilon is null without a guarantee."""

    def points(groups: Iterable[Group]) -> list[list[Any]]:
        return [[g.epsilon and _digits(g.epsilon), g.accuracy.mean, g.accuracy.std or 0.0, g.label] for g in groups]

    lines = [
        {
            "label": line.label,
            "guaranteed": {mechanism: points(groups) for mechanism, groups in line.guaranteed.items()},
            "public": points(line.public),
            "unguaranteed": points(line.unguaranteed),
        }
        for line in picture.lines
    ]
    return {"title": picture.title, "lines": lines}


def _counts(report: Report) -> str:
    states = Counter(run.state for run in report.runs)
    by_state = ", ".join(f"{number:,} {state}" for state, number in sorted(states.items()))
    return f"{len(report.runs):,} runs ({by_state}) in {len(report.grouping.groups):,} groups"


def _section(table: Table) -> str:
    return f'<section class="comparison">\n{html_table(table)}\n</section>'


def _cell(cell: Cell, is_text: bool, first: bool) -> str:
    value = "" if cell.sort_value is None else html.escape(str(cell.sort_value))
    kind = "text" if is_text else "number"
    tag, scope = ("th", ' scope="row"') if first else ("td", "")
    return f'<{tag}{scope} class="{kind}" data-sort="{value}">{html.escape(cell.text)}</{tag}>'


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
