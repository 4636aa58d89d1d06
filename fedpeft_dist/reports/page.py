"""report.html: the report as one page that needs nothing but a browser.

The tables are plain HTML, made here. The curves and the partitions travel as JSON; the scripts draw them, sort and
filter. The page makes no request at all (its Content-Security-Policy forbids it). Everything in it is escaped, because
names of runs come from folders, and folders can have any name.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft_dist.reports.axes import show
from fedpeft_dist.reports.groups import Group
from fedpeft_dist.reports.runs import Run
from fedpeft_dist.reports.tables import Cell, Table

if TYPE_CHECKING:
    from fedpeft_dist.reports.report import Report

MAX_POINTS = 200
"""A longer curve is thinned out to so many points."""
MAX_PICTURES, MAX_CELLS = 48, 500_000
"""Limits of a page: the partitions, and the numbers in all partitions together (about a megabyte)."""
SCRIPTS = ("page.js", "charts.js", "curves.js", "epsilon.js", "partitions.js")


def page_text(report: "Report") -> str:
    partitions, left_out = partition_pictures(report.runs)
    series = [line_data(line) for line in report.lines]
    states = Counter(run.state for run in report.runs)
    by_state = ", ".join(f"{number:,} {state}" for state, number in sorted(states.items()))
    labels = [group.label for group in report.grouping.groups]
    slots = {
        "title": escape(f"Runs below {report.name}"),
        "counts": escape(f"{len(report.runs):,} runs ({by_state}) in {len(labels):,} groups"),
        "style": _asset("report.css"),
        "script": "\n".join(map(_asset, SCRIPTS)),
        "data": script_json({"series": series, "epsilon": report.epsilon_pictures, "partitions": partitions}),
        "none_yet": "" if labels else "No run is complete yet.",
        "groups": html_table(report.main, "groups", selectable=labels),
        "privacy": html_table(report.privacy) if report.privacy.rows else "",
        "comparisons": "\n".join(map(_section, report.comparisons)),
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
    kinds = ["text" if column.is_text else "number" for column in table.columns]
    headings = [
        f'<th scope="col" class="{kind}" aria-sort="none"><button type="button">{escape(column.heading)}</button></th>'
        for column, kind in zip(table.columns, kinds)
    ]
    rows = [[_cell(*found) for found in zip(row, kinds, ["th"] + ["td"] * len(row))] for row in table.rows]
    if selectable:
        headings.insert(0, '<th scope="col"><span class="hidden">highlight</span></th>')
    for label, cells in zip(selectable, rows):
        box = f'<input type="checkbox" aria-label="{escape(f"highlight {label}")}">'
        cells.insert(0, f'<td><label class="pick">{box}<i></i></label></td>')
    body = "".join(f'\n<tr data-row="{number}">{"".join(cells)}</tr>' for number, cells in enumerate(rows))
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">
<table class="sortable"{identity and f" id={identity}"}>
<caption>{escape(table.title)}</caption>
<thead><tr>{"".join(headings)}</tr></thead><tbody>{body}
</tbody></table></div>{note}"""


def _cell(cell: Cell, kind: str, tag: str) -> str:
    value, scope = cell.value, ' scope="row"' if tag == "th" else ""
    if isinstance(value, list | dict):  # the largest number, or the mean
        value = value[-1] if isinstance(value, list) else value["mean"]
    sort = "" if value is None else escape(str(value))
    return f'<{tag}{scope} class="{kind}" data-sort="{sort}">{escape(cell.text)}</{tag}>'


def _section(table: Table) -> str:
    return f'<section class="comparison">\n{html_table(table)}\n</section>'


def line_data(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of `Report.lines` with fewer points and digits."""

    def thinned(values: list[Any]) -> list[Any]:
        places = np.linspace(0, len(values) - 1, min(len(values), MAX_POINTS)).round().astype(int)
        return [_digits(values[place]) for place in places]

    return {key: thinned(value) if isinstance(value, list) else value for key, value in line.items()}


def script_json(data: Any) -> str:
    """JSON that can neither end its script element nor start a comment there.

    A group becomes a point: [epsilon, mean, std, label]. The epsilon is null without a guarantee.
    """

    def point(group: Group) -> list[Any]:
        return [_digits(group.epsilon), group.accuracy.mean, group.accuracy.std or 0.0, group.label]

    text = json.dumps(data, separators=(",", ":"), allow_nan=False, default=point)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def partition_pictures(runs: Iterable[Run]) -> tuple[list[dict[str, Any]], int]:
    """Each distinct partition once, and how many more there are. Further seeds of a setting come last.

    Partitions of a data set over as many clients share a scale: an even one looks pale beside an uneven one.
    """
    holders: dict[tuple[str, bytes], list[Run]] = defaultdict(list)
    most: Counter[tuple[str, int]] = Counter()
    for run in runs:
        if run.partition is not None:
            counts = run.partition["counts"]
            holders[_setting(run), counts.tobytes()].append(run)
            most[_scale(run)] = max(most[_scale(run)], int(counts.max()))
    first = {key[0]: key for key in reversed(holders)}
    shown, cells = [], 0
    for key in sorted(holders, key=lambda key: key != first[key[0]])[:MAX_PICTURES]:
        partition = holders[key][0].partition
        cells += partition["counts"].size
        if cells > MAX_CELLS and shown:
            break
        seeds = ", ".join(map(str, sorted({run.seed for run in holders[key] if run.seed is not None})))
        shown.append(
            {
                "title": f"{key[0]}, seed {seeds}" if seeds else key[0],
                "runs": len(holders[key]),
                "clients": partition["num_clients"],
                "most": most[_scale(holders[key][0])],
                "names": partition["class_names"],
                "counts": partition["counts"].tolist(),
            }
        )
    return shown, len(holders) - len(shown)


def _scale(run: Run) -> tuple[str, int]:
    return run.keys.get("data.name", run.name), run.partition["num_clients"]


def _setting(run: Run) -> str:
    """`digits, 500 samples, dirichlet 0.1, N=64`."""
    (data_set, clients), samples = _scale(run), run.keys.get("data.max_train")
    partition = (run.keys.get(f"data.partition.{key}") for key in ("name", "alpha"))
    split = " ".join(show(value) for value in partition if value is not None)
    return ", ".join(filter(None, [data_set, samples and f"{samples:,} samples", split, f"N={clients:,}"]))


def _digits(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
