"""A report over the runs below a directory: what each method sends, what accuracy it buys, and how sure that is.

Runs are read (report_runs), grouped over their seeds (report_groups), called by what tells them apart (report_labels),
compared (report_tables), and written as text (report_formats), as a picture (report_plot), as a page (report_page).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft_dist.lanes.wire import BYTES_PER_PARAMETER, MIB
from fedpeft_dist.reports.formats import csv_text, escape_markdown, json_table, markdown_table
from fedpeft_dist.reports.groups import Group, Grouping, group_runs
from fedpeft_dist.reports.page import write_page
from fedpeft_dist.reports.plot import plot_accuracy, plot_epsilon
from fedpeft_dist.reports.privacy import EpsilonPicture, epsilon_pictures, privacy_table, private_row
from fedpeft_dist.reports.runs import Run, epsilon_of, read_runs
from fedpeft_dist.reports.tables import Table, comparison_tables, main_table, run_table, unfinished_table
from fedpeft_dist.reports.time import time_tables
from fedpeft_dist.runtime.files import write_atomically, write_text
from fedpeft_dist.tracking.run_directory import COMPLETE


@dataclass(frozen=True)
class Report:
    name: str
    """Of the directory."""
    runs: tuple[Run, ...]
    grouping: Grouping
    main: Table
    """One row a group, in the order of the groups."""
    privacy: Table
    """Without rows where no run is private."""
    epsilon_pictures: tuple[EpsilonPicture, ...]
    comparisons: tuple[Table, ...]
    unfinished: Table

    @property
    def unfinished_runs(self) -> list[Run]:
        return [run for run in self.runs if run.state != COMPLETE]


def make_report(directory: Path) -> Report:
    """
    Raises:
        ConfigError: there is no run at or below the directory, or none that can be read.
    """
    runs = read_runs(directory)
    grouping = group_runs(runs)
    return Report(
        name=directory.absolute().name,
        runs=tuple(runs),
        grouping=grouping,
        main=main_table(grouping),
        privacy=privacy_table(grouping),
        epsilon_pictures=tuple(epsilon_pictures(grouping)),
        comparisons=(*comparison_tables(grouping), *time_tables(grouping)),
        unfinished=unfinished_table(runs),
    )


def printed_tables(report: Report) -> list[Table]:
    """What is worth showing on a terminal: no table without rows."""
    return [table for table in (report.main, report.privacy, *report.comparisons, report.unfinished) if table.rows]


def run_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a run, fewest bytes first; bytes are of the uplink. An unfinished run has its state alone."""
    rows = []
    for run in runs:
        row: dict[str, Any] = {"run": run.name, "state": run.state}
        if run.summary is not None:
            parameters = run.summary["trainable_parameters"]
            row |= {
                "method": run.summary["method"],
                "seed": run.seed,
                "trained_parameters": parameters,
                "mib_per_client": parameters * BYTES_PER_PARAMETER / MIB,
                "mib_total": run.summary["uplink_bytes_total"] / MIB,
                "share_of_full": parameters / run.summary["backbone_parameters"],
                "final_accuracy": run.summary["final_accuracy"],
            }
            if run.summary.get("privacy") is not None:
                row["epsilon"] = epsilon_of(run.summary)
        rows.append(row)
    return sorted(rows, key=lambda row: (row.get("mib_total", float("inf")), row["run"]))


def json_report(report: Report) -> dict[str, Any]:
    """What `--json` prints."""
    unfinished = [
        {"run": run.name, "state": run.state, "rounds_done": run.rounds_done, "problem": run.problem}
        for run in report.unfinished_runs
    ]
    return {
        "runs": run_rows(report.runs),
        "groups": [_group_row(group, report.grouping) for group in report.grouping.groups],
        "tables": [json_table(table) for table in (report.main, report.privacy, *report.comparisons) if table.rows],
        "unfinished": unfinished,
    }


def write_report(directory: Path, report: Report) -> list[Path]:
    """Writes the report beside the runs, as text, tables, a picture and a page; returns their paths.

    Raises:
        OSError: they cannot be written there.
    """
    plot, epsilon_plot = directory / "accuracy_against_bytes.png", directory / "accuracy_against_epsilon.png"
    texts = {
        directory / "report.md": markdown_report(report, plot.name, epsilon_plot.name),
        directory / "report.csv": csv_text(run_table(report.runs, report.grouping)),
        directory / "report_groups.csv": csv_text(report.main),
    }
    page = directory / "report.html"
    write_atomically(plot, lambda path: plot_accuracy(report.grouping, report.unfinished_runs, path))
    plots = [plot]
    if report.epsilon_pictures:
        write_atomically(epsilon_plot, lambda path: plot_epsilon(report.epsilon_pictures, path))
        plots.append(epsilon_plot)
    for path, text in texts.items():
        write_text(path, text)
    write_page(page, report)
    return [*texts, *plots, page]


def markdown_report(report: Report, plot: str, epsilon_plot: str = "") -> str:
    """
    Args:
        plot: where the pictures are, as seen from the text.
    """
    parts = [f"# Runs below {escape_markdown(report.name)}\n"]
    if report.main.rows:
        parts.append(markdown_table(report.main))
    parts.append(f"![Accuracy against bytes]({plot})\n")
    for table in (report.privacy, *report.comparisons, report.unfinished):
        if table.rows:
            parts.append(f"## {escape_markdown(table.title)}\n\n{markdown_table(table)}")
        if table is report.privacy and report.epsilon_pictures:
            parts.append(f"![Accuracy against epsilon]({epsilon_plot})\n")
    return "\n".join(parts)


def _group_row(group: Group, grouping: Grouping) -> dict[str, Any]:
    final, best = group.accuracy, group.best_accuracy
    return {
        "label": group.label,
        "method": group.method,
        "axes": {axis: group.axes[axis].label for axis in grouping.varying()},
        "runs": [run.name for run in group.runs],
        "seeds": group.seeds,
        "trained_parameters": group.parameters,
        "cohort": group.cohort,
        "mib_per_client": group.mib_per_client,
        "mib_per_round": group.mib_per_round,
        "mib_total": group.mib_total,
        "share_of_full": group.share_of_full,
        "simulated_hours": group.simulated_hours,
        "epsilon": group.epsilon,
        "privacy": private_row(group),
        "final_accuracy": {"mean": final.mean, "std": final.std},
        "best_accuracy": {"mean": best.mean, "std": best.std},
    }
