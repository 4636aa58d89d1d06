"""Writing a report beside the runs: as text, tables, pictures and a page."""

from pathlib import Path

from fedpeft_dist.reports.formats import csv_text, escape_markdown, markdown_table
from fedpeft_dist.reports.overview import run_table
from fedpeft_dist.reports.page import page_text
from fedpeft_dist.reports.plot import accuracy_figure, epsilon_figure, save
from fedpeft_dist.reports.report import Report
from fedpeft_dist.runtime.files import write_atomically, write_text

ACCURACY_PLOT, EPSILON_PLOT = "accuracy_against_bytes.png", "accuracy_against_epsilon.png"


def write_report(directory: Path, report: Report) -> list[Path]:
    """Writes the report's files and returns their paths.

    Raises:
        OSError: the files cannot be written.
    """
    texts = {
        "report.md": markdown_report(report),
        "report.csv": csv_text(run_table(report.runs, report.grouping)),
        "report_groups.csv": csv_text(report.main),
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
