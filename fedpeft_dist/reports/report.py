"""A report over the runs below a directory: what each method sends, what accuracy it buys, and how sure that is.

Runs are read (runs), grouped over their seeds (groups) along axes (axes), and compared (comparisons, privacy). `tables`
says what a table is and how it is written. `plot` and `page` draw. This file puts the parts together, and into files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpeft_dist.lanes.wire import MIB
from fedpeft_dist.reports.axes import show
from fedpeft_dist.reports.comparisons import comparison_tables, main_table, time_tables, unfinished_table
from fedpeft_dist.reports.groups import Group, Grouping, group_runs
from fedpeft_dist.reports.page import page_text
from fedpeft_dist.reports.plot import accuracy_figure, epsilon_figure, save
from fedpeft_dist.reports.privacy import epsilon_pictures, privacy_row, privacy_table
from fedpeft_dist.reports.runs import Point, Run, read_runs
from fedpeft_dist.reports.tables import Cell, Column, Table, csv_table, escape_markdown, json_table, markdown_table
from fedpeft_dist.runtime.files import write_atomically, write_text
from fedpeft_dist.tracking.run_directory import COMPLETE

ACCURACY_PLOT, EPSILON_PLOT = "accuracy_against_bytes.png", "accuracy_against_epsilon.png"
_SUMMARY_KEYS = (
    *("trainable_parameters", "backbone_parameters", "uplink_bytes_total", "downlink_bytes_total"),
    *("simulated_hours", "final_accuracy", "best_accuracy", "samples_per_second", "weights_sha256"),
)
_GROUP_KEYS = (
    *("seeds", "trained_parameters", "cohort", "mib_per_client", "mib_per_round", "mib_total", "share_of_full"),
    *("simulated_hours", "epsilon"),
)


class Report:
    """
    Raises:
        ConfigError: there is no run at or below the directory, or no run that can be read.
    """

    def __init__(self, directory: Path):
        self.name = directory.absolute().name
        self.runs = read_runs(directory)
        self.grouping = group_runs(self.runs)
        self.main = main_table(self.grouping)  # one row a group, in the order of the groups
        self.privacy = privacy_table(self.grouping)  # empty where no run is private
        self.epsilon_pictures = epsilon_pictures(self.grouping)
        self.comparisons = [*comparison_tables(self.grouping), *time_tables(self.grouping)]
        self.unfinished = unfinished_table(self.runs)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The groups' curves in the order of the groups, then the curves of unfinished runs; a list for each axis."""
        found = [(g.label, g.method, COMPLETE, g.num_seeds, g.curve) for g in self.grouping.groups]
        found += [
            (f"{run.name} ({run.state})", run.keys.get("method.name", ""), run.state, 1, run.curve)
            for run in self.runs
            if run.state != COMPLETE and run.curve
        ]
        lines = []
        for *told, curve in found:
            line = dict(zip(("label", "method", "state", "seeds"), told))
            line |= {name: [getattr(point, name) for point in curve] for name in Point._fields}
            lines.append(line | ({"hours": []} if None in line["hours"] else {}))
        return lines

    @property
    def tables(self) -> list[Table]:
        """The tables that compare groups, without empty ones."""
        return [table for table in (self.main, self.privacy, *self.comparisons) if table.rows]

    @property
    def printed_tables(self) -> list[Table]:
        """The tables for a terminal."""
        return [*self.tables, *([self.unfinished] if self.unfinished.rows else [])]


def json_report(report: Report) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "runs": run_rows(report.runs),
        "groups": [_group_row(group, report.grouping) for group in report.grouping.groups],
        "tables": [json_table(table) for table in report.tables],
        "unfinished": [
            {"run": run.name, "state": run.state, "rounds_done": run.rounds_done, "problem": run.problem}
            for run in report.runs
            if run.state != COMPLETE
        ],
    }


def run_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a run; the fewest uplink bytes come first. An unfinished run has its name and state alone."""
    rows = []
    for run in runs:
        row: dict[str, Any] = {"run": run.name, "state": run.state}
        if run.summary:
            parameters = run.summary["trainable_parameters"]
            row |= {
                "method": run.summary["method"],
                "seed": run.seed,
                "trained_parameters": parameters,
                "mib_per_client": run.mib_per_client,
                "mib_total": run.summary["uplink_bytes_total"] / MIB,
                "share_of_full": parameters / run.summary["backbone_parameters"],
                "final_accuracy": run.summary["final_accuracy"],
            }
            if run.privacy:
                row["epsilon"] = run.privacy["epsilon"]
        rows.append(row)
    return sorted(rows, key=lambda row: (row.get("mib_total", float("inf")), row["run"]))


def _group_row(group: Group, grouping: Grouping) -> dict[str, Any]:
    accuracies = {"final_accuracy": group.accuracy, "best_accuracy": group.best_accuracy}
    return {
        "label": group.label,
        "method": group.method,
        "axes": {axis.name: show(group.axes[axis.name]) for axis in grouping.varying},
        "runs": [run.name for run in group.runs],
        **{key: getattr(group, key) for key in _GROUP_KEYS},
        "privacy": privacy_row(group),
        **{name: {"mean": found.mean, "std": found.std} for name, found in accuracies.items()},
    }


def runs_csv(report: Report) -> str:
    """One row a run, with every config key that differs between runs."""
    labels = {run.name: group.label for group in report.grouping.groups for run in group.runs}
    keys = sorted({key for run in report.runs for key in run.keys} - {"seed", "method.name"})
    differing = [k for k in keys if len({repr(run.keys[k]) for run in report.runs if k in run.keys}) > 1]
    rows = []
    for run in report.runs:
        rows.append(
            {"run": run.name, "state": run.state, "group": labels.get(run.name)}
            | {key: run.keys.get(key) for key in ("method.name", *differing, "seed")}
            | {"rounds_done": run.rounds_done}
            | {key: run.summary.get(key) for key in _SUMMARY_KEYS}
            | {key: run.privacy.get(key) for key in ("epsilon", "dp_delta", "noise_multiplier", "guarantee")}
            | {"outside_guarantee": ", ".join(run.privacy.get("outside") or ()), "problem": run.problem}
        )
    cells = [[Cell("", value) for value in row.values()] for row in rows]
    return csv_table(Table("runs", "All runs", [*map(Column, rows[0])], cells))


def markdown_report(report: Report) -> str:
    parts = [f"# Runs below {escape_markdown(report.name)}\n"]
    if report.main.rows:
        parts.append(markdown_table(report.main))
    parts.append(f"![Accuracy against bytes]({ACCURACY_PLOT})\n")
    for table in report.printed_tables:
        if table is not report.main:
            parts.append(f"## {escape_markdown(table.title)}\n\n{markdown_table(table)}")
        if table is report.privacy and report.epsilon_pictures:
            parts.append(f"![Accuracy against epsilon]({EPSILON_PLOT})\n")
    return "\n".join(parts)


def write_report(directory: Path, report: Report) -> list[Path]:
    """Writes the report's files and returns their paths.

    Raises:
        OSError: the files cannot be written.
    """
    texts = {
        "report.md": markdown_report(report),
        "report.csv": runs_csv(report),
        "report_groups.csv": csv_table(report.main),
        "report.html": page_text(report),
    }
    figures = {ACCURACY_PLOT: accuracy_figure(report.lines)}
    if report.epsilon_pictures:
        figures[EPSILON_PLOT] = epsilon_figure(report.epsilon_pictures)
    for name, figure in figures.items():
        write_atomically(directory / name, lambda path, figure=figure: save(figure, path))
    for name, text in texts.items():
        write_text(directory / name, text)
    *tables, page = texts
    return [directory / name for name in (*tables, *figures, page)]
