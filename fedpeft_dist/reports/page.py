"""report.html: the report as one page that needs nothing but a browser.

The tables are plain HTML, made here. The curves and the partitions travel as JSON; report.js draws them, sorts and
filters. The page allows itself no request at all (its Content-Security-Policy), and everything in it is escaped: names
of runs come from folders, and folders can be called anything.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft_dist.reports.groups import Group, Grouping
from fedpeft_dist.reports.labels import show
from fedpeft_dist.reports.privacy import EpsilonPicture
from fedpeft_dist.reports.runs import Point, Run
from fedpeft_dist.reports.tables import Cell, Table
from fedpeft_dist.runtime.files import write_text

if TYPE_CHECKING:
    from fedpeft_dist.reports.report import Report

MAX_POINTS = 200
"""Of a curve; a longer one is thinned out."""
MAX_PICTURES, MAX_CELLS = 48, 500_000
"""Partitions in a page, and the numbers in all of them: about a megabyte."""


def write_page(path: Path, report: Report) -> None:
    pictures, left_out = partition_pictures(report.runs)
    data = {
        "series": [*group_series(report.grouping), *run_series(report.unfinished_runs)],
        "epsilon": [epsilon_data(picture) for picture in report.epsilon_pictures],
        "partitions": pictures,
    }
    slots = {
        "title": html.escape(f"Runs below {report.name}"),
        "counts": html.escape(_counts(report)),
        "style": _asset("report.css"),
        "script": _asset("report.js"),
        "data": script_json(data),
        "none_yet": "" if report.main.rows else "No run is complete yet.",
        "groups": html_table(report.main, "groups", selectable=[group.label for group in report.grouping.groups]),
        "privacy": html_table(report.privacy) if report.privacy.rows else "",
        "comparisons": "\n".join(_section(table) for table in report.comparisons),
        "left_out": f"{left_out} more partitions are not shown." if left_out else "",
        "unfinished": _section(report.unfinished) if report.unfinished.rows else "",
    }
    # In one pass: what is put into one slot is never searched for another.
    write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda slot: slots[slot[1]], _asset("report.html")))


def html_table(table: Table, identity: str = "", selectable: Sequence[str] = ()) -> str:
    """A table with headings to sort by; selectable: the rows' names, for a box to tick in each."""
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
    """JSON that cannot end the script element that it stands in, nor start a comment there."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def group_series(grouping: Grouping) -> Iterable[dict[str, Any]]:
    """A curve a group, in the order of the main table's rows."""
    for group in grouping.groups:
        curve = _thin(group.curve())
        yield {
            "label": group.label,
            "method": group.method,
            "state": "complete",
            "seeds": group.accuracy.seeds,
            "round": [point.round for point, _ in curve],
            "mib": [_digits(point.mib_sent) for point, _ in curve],
            "hours": _hours([point for point, _ in curve]),
            "mean": [_digits(found.mean) for _, found in curve],
            "std": [_digits(found.std or 0.0) for _, found in curve],
        }


def run_series(runs: Iterable[Run]) -> Iterable[dict[str, Any]]:
    """A curve for each unfinished run, as far as it went."""
    for run in runs:
        curve = _thin(run.curve)
        if curve:
            yield {
                "label": f"{run.name} ({run.state})",
                "method": run.keys.get("method.name", ""),
                "state": run.state,
                "seeds": 1,
                "round": [point.round for point in curve],
                "mib": [_digits(point.mib_sent) for point in curve],
                "hours": _hours(curve),
                "mean": [_digits(point.accuracy) for point in curve],
                "std": [0] * len(curve),
            }


def epsilon_data(picture: EpsilonPicture) -> dict[str, Any]:
    """A picture's points by line: [epsilon, mean, std, label], without an epsilon where there is no guarantee."""

    def points(groups: Iterable[Group]) -> list[list[Any]]:
        return [
            [group.epsilon and _digits(group.epsilon), group.accuracy.mean, group.accuracy.std or 0.0, group.label]
            for group in groups
        ]

    return {
        "title": picture.title,
        "lines": [
            {
                "label": line.label,
                "guaranteed": {mechanism: points(groups) for mechanism, groups in line.guaranteed.items()},
                "public": points(line.public),
                "unguaranteed": points(line.unguaranteed),
            }
            for line in picture.lines
        ],
    }


def partition_pictures(runs: Iterable[Run]) -> tuple[list[dict[str, Any]], int]:
    """Each distinct partition once, and how many more there are; other seeds of a setting come last."""
    found: dict[str, tuple[dict[str, Any], list[Run]]] = {}
    for run in runs:
        if run.partition is not None:
            content = json.dumps([run.partition["num_clients"], run.partition["counts"]])
            found.setdefault(content, (run.partition, []))[1].append(run)
    seen: Counter[str] = Counter()
    ranked = []
    for partition, holders in found.values():
        settings = sorted({_setting(run, partition["num_clients"]) for run in holders})
        seeds = sorted({run.seed for run in holders if run.seed is not None})
        ranked.append((seen[settings[0]], settings, seeds, partition, len(holders)))
        seen[settings[0]] += 1
    # One scale for all partitions of a data set over as many clients: an even one then looks pale beside an uneven one.
    most: Counter[tuple[str, int]] = Counter()
    for _, settings, _, partition, _ in ranked:
        scale = _scale(partition, settings)
        most[scale] = max(most[scale], *(max(row) for row in partition["counts"]))
    pictures, cells = [], 0
    for _, settings, seeds, partition, holders in sorted(ranked, key=lambda item: item[:3]):
        counts = partition["counts"]
        cells += len(counts) * len(counts[0])
        if len(pictures) == MAX_PICTURES or (cells > MAX_CELLS and pictures):
            break
        named = "; ".join(settings[:2]) + ("; ..." if len(settings) > 2 else "")
        title = f"{named}, seed {', '.join(map(str, seeds))}" if seeds else named
        names = partition.get("class_names")
        pictures.append(
            {
                "title": title,
                "runs": holders,
                "clients": partition["num_clients"],
                "most": most[_scale(partition, settings)],
                "names": [str(name) for name in names] if names else None,
                "counts": counts,
            }
        )
    return pictures, len(found) - len(pictures)


def _scale(partition: dict[str, Any], settings: Sequence[str]) -> tuple[str, int]:
    return settings[0].split(",")[0], partition["num_clients"]


def _setting(run: Run, num_clients: int) -> str:
    keys = run.keys
    parts = [show(keys.get("data.name", run.name))]
    if keys.get("data.max_train") is not None:
        parts.append(f"{keys['data.max_train']:,} samples")
    partition = (keys.get(f"data.partition.{key}") for key in ("name", "alpha"))
    parts.append(" ".join(show(value) for value in partition if value is not None))
    return ", ".join([*filter(None, parts), f"N={num_clients:,}"])


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


def _thin(curve: Sequence[Any]) -> list[Any]:
    """The whole of a short curve, or evenly spread points of a long one, with its last."""
    if len(curve) <= MAX_POINTS:
        return list(curve)
    return [curve[round(number * (len(curve) - 1) / (MAX_POINTS - 1))] for number in range(MAX_POINTS)]


def _hours(points: Sequence[Point]) -> list[float]:
    """None at all where there is no simulated time."""
    hours = [point.hours for point in points]
    return [] if None in hours else [_digits(value) for value in hours]


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
