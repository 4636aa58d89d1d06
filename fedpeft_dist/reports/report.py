"""A report over the runs below a directory: what each method sends, what accuracy it buys, and how sure that is.

Runs are read (runs), grouped over their seeds (groups) along axes (axes), and compared (overview, comparisons, privacy,
time). `writing` puts the report into files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft_dist.lanes.wire import BYTES_PER_PARAMETER, MIB
from fedpeft_dist.reports.axes import show
from fedpeft_dist.reports.comparisons import comparison_tables
from fedpeft_dist.reports.formats import json_table
from fedpeft_dist.reports.groups import Group, Grouping, group_runs
from fedpeft_dist.reports.lines import Line, group_lines, unfinished_lines
from fedpeft_dist.reports.overview import main_table, unfinished_table
from fedpeft_dist.reports.privacy import EpsilonPicture, epsilon_pictures, privacy_table, private_row
from fedpeft_dist.reports.runs import Run, read_runs
from fedpeft_dist.reports.table import Table
from fedpeft_dist.reports.time import time_tables
from fedpeft_dist.tracking.run_directory import COMPLETE


@dataclass(frozen=True)
class Report:
    name: str
    """The directory's name."""
    runs: tuple[Run, ...]
    grouping: Grouping
    main: Table
    """One row a group, in the order of the groups."""
    privacy: Table
    """Empty where no run is private."""
    epsilon_pictures: tuple[EpsilonPicture, ...]
    comparisons: tuple[Table, ...]
    unfinished: Table

    @property
    def lines(self) -> list[Line]:
        """The groups' curves in the order of the groups, then the curves of unfinished runs."""
        return [*group_lines(self.grouping), *unfinished_lines(self.runs)]

    @property
    def tables(self) -> list[Table]:
        """The tables that compare groups, without empty ones."""
        return [table for table in (self.main, self.privacy, *self.comparisons) if table.rows]

    @property
    def printed_tables(self) -> list[Table]:
        """The tables for a terminal."""
        return [*self.tables, *([self.unfinished] if self.unfinished.rows else [])]


def make_report(directory: Path) -> Report:
    """
    Raises:
        ConfigError: there is no run at or below the directory, or no run that can be read.
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


def run_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a run; the fewest uplink bytes come first. An unfinished run has its name and state alone."""
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
            if run.privacy is not None:
                row["epsilon"] = run.epsilon
        rows.append(row)
    return sorted(rows, key=lambda row: (row.get("mib_total", float("inf")), row["run"]))


def json_report(report: Report) -> dict[str, Any]:
    """The object that `--json` prints."""
    unfinished = [
        {"run": run.name, "state": run.state, "rounds_done": run.rounds_done, "problem": run.problem}
        for run in report.runs
        if run.state != COMPLETE
    ]
    return {
        "runs": run_rows(report.runs),
        "groups": [_group_row(group, report.grouping) for group in report.grouping.groups],
        "tables": [json_table(table) for table in report.tables],
        "unfinished": unfinished,
    }


def _group_row(group: Group, grouping: Grouping) -> dict[str, Any]:
    final, best = group.accuracy, group.best_accuracy
    return {
        "label": group.label,
        "method": group.method,
        "axes": {axis.name: show(group.axes[axis.name]) for axis in grouping.varying},
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
