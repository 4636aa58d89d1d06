"""Tables and plots over finished runs: what each method sends and what accuracy it buys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.runtime.files import write_atomically, write_text
from fedpeft_dist.tracking.cost import MIB, uplink_bytes
from fedpeft_dist.tracking.run_directory import COMPLETE, RunDirectory, read_json, read_metrics

COLUMNS = (
    ("run", "run", "{}"),
    ("method", "method", "{}"),
    ("trained_parameters", "trained parameters", "{:,}"),
    ("mib_per_client", "MiB per client and round", "{:,.4f}"),
    ("mib_total", "total MiB", "{:,.2f}"),
    ("share_of_full", "share of full's bytes", "{:.2%}"),
    ("final_accuracy", "final accuracy", "{:.4f}"),
)
"""Key, heading, format."""
TEXT_COLUMNS = ("run", "method")
SUMMARY_KEYS = ("method", "trainable_parameters", "backbone_parameters", "uplink_bytes_total", "final_accuracy")
"""What is read of a run's summary."""


@dataclass(frozen=True)
class Run:
    """A run as a report sees it; summary is None while it is unfinished."""

    name: str
    state: str
    summary: dict[str, Any] | None
    metrics: list[dict[str, Any]]


def read_runs(directory: Path) -> list[Run]:
    """The runs at or below a directory, by name.

    Raises:
        ConfigError: there is none, or one's files cannot be read.
    """
    runs = []
    for state_file in sorted(directory.rglob("state.json")):
        run = RunDirectory(state_file.parent)
        state = run.read_state()["state"]
        summary = read_json(run.summary_file, *SUMMARY_KEYS) if state == COMPLETE else None
        metrics = read_metrics(run.metrics_file) if run.metrics_file.exists() else []
        name = str(run.path.relative_to(directory)) if run.path != directory else run.path.name
        runs.append(Run(name, state, summary, metrics))
    if not runs:
        raise ConfigError(f"{directory}: no run's directory (state.json) at or below it")
    return runs


def table_rows(runs: list[Run]) -> list[dict[str, Any]]:
    """One row a run, fewest bytes first; bytes are of the uplink. An unfinished run has its state alone."""
    rows = []
    for run in runs:
        row: dict[str, Any] = {"run": run.name, "state": run.state}
        if run.summary is not None:
            parameters = run.summary["trainable_parameters"]
            row |= {
                "method": run.summary["method"],
                "trained_parameters": parameters,
                "mib_per_client": uplink_bytes(parameters, 1) / MIB,
                "mib_total": run.summary["uplink_bytes_total"] / MIB,
                "share_of_full": parameters / run.summary["backbone_parameters"],
                "final_accuracy": run.summary["final_accuracy"],
            }
        rows.append(row)
    return sorted(rows, key=lambda row: (row.get("mib_total", float("inf")), row["run"]))


def rich_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)  # narrow enough for 80 columns
    for key, heading, _ in COLUMNS:
        table.add_column(heading, justify="left" if key in TEXT_COLUMNS else "right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def markdown_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(heading for _, heading, _ in COLUMNS) + " |"]
    lines.append("|" + "|".join(" --- " if key in TEXT_COLUMNS else " ---: " for key, _, _ in COLUMNS) + "|")
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write_report(directory: Path, runs: list[Run], table: str) -> list[Path]:
    """Writes report.md and accuracy_against_bytes.png beside the runs; returns their paths."""
    plot, text = directory / "accuracy_against_bytes.png", directory / "report.md"
    write_atomically(plot, lambda path: _plot_accuracy(runs, path))
    write_text(text, f"# Runs below {directory.name}\n\n{table}\n![Accuracy against bytes]({plot.name})\n")
    return [text, plot]


def _cells(row: dict[str, Any]) -> list[str]:
    if "final_accuracy" not in row:
        return [row["run"], row["state"], *[""] * (len(COLUMNS) - 2)]
    return [form.format(row[key]) for key, _, form in COLUMNS]


def _plot_accuracy(runs: list[Run], path: Path) -> None:
    """Accuracy after each round against the MiB that all clients together have sent by then."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        sent, accuracy, total = [], [], 0
        for row in run.metrics:
            total += row["uplink_bytes"]
            if row["accuracy"] is not None:
                sent.append(total / MIB)
                accuracy.append(row["accuracy"])
        if sent:
            axes.plot(sent, accuracy, marker=".", label=run.name)
    axes.set(
        xscale="log", xlabel="MiB sent by all clients (uplink)", ylabel="accuracy of the global model", ylim=(0, 1)
    )
    axes.grid(alpha=0.3)
    if axes.lines:
        figure.legend(loc="outside right upper")  # beside the lines, wherever they run
    figure.savefig(path, dpi=120)
