"""Unfinished and damaged runs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.reports.report import Report, json_report, markdown_report, run_rows, write_report
from fedpeft_dist.tracking.run_directory import FAILED, RunDirectory
from tests.report_fixtures import (
    csv_rows,
    curve,
    headings,
    make_run,
    texts,
    tree,
)


def test_unfinished_runs_are_listed_everywhere(runs: Path) -> None:
    report = Report(runs)
    assert texts(report.unfinished) == [["sweep/lora", "interrupted", "3"]]
    assert "| sweep/lora | interrupted | 3 |" in markdown_report(report)
    found = json_report(report)
    assert found["unfinished"] == [{"run": "sweep/lora", "state": "interrupted", "rounds_done": 3, "problem": None}]
    write_report(runs, report)
    assert "sweep/lora" in (runs / "report.html").read_text()
    rows = csv_rows(runs / "report.csv")
    assert [(row["run"], row["state"]) for row in rows] == [
        ("full", "complete"),
        ("sweep/head", "complete"),
        ("sweep/lora", "interrupted"),
    ]


def test_a_report_on_runs_that_have_just_begun_raises_no_warning(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "new").write_state("running", 0)  # the state comes before the config
    report = Report(tmp_path)
    assert run_rows(report.runs) == [{"run": "new", "state": "running"}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = write_report(tmp_path, report)
    assert all(path.exists() for path in written)
    assert "No run is complete yet." in (tmp_path / "report.html").read_text()


def test_a_directory_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run's directory \(state\.json\)"):
        Report(tmp_path)


SUMMARY = {"method": "bias", "trainable_parameters": 8, "backbone_parameters": 9, "uplink_bytes_total": 7}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", None),
        ("summary.json", '{"method": "bi'),
        ("summary.json", json.dumps(SUMMARY)),
        ("summary.json", json.dumps({**SUMMARY, "final_accuracy": None})),
        ("summary.json", json.dumps({**SUMMARY, "final_accuracy": float("nan")})),
        ("summary.json", json.dumps({**SUMMARY, "final_accuracy": 0.5, "backbone_parameters": 0})),
        ("config.yaml", None),
        ("config.yaml", "method: [1"),
        ("config.yaml", "method: {name: unheard}"),
        ("state.json", ""),
    ],
)
def test_a_damaged_run_is_listed_and_hides_no_other_run(runs: Path, name: str, content: str | bytes | None) -> None:
    path = runs / "full" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    report = Report(runs)
    damaged, unfinished = (run for run in report.runs if run.state != "complete")
    assert (damaged.name, damaged.state, unfinished.state) == ("full", "damaged", "interrupted")
    assert str(path) in damaged.problem
    assert "\n" not in damaged.problem
    assert [group.label for group in report.grouping.groups] == ["head"]
    assert json_report(report)["unfinished"][0]["problem"] == damaged.problem
    assert headings(report.unfinished)[-1] == "what is wrong"
    write_report(runs, report)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", "7\n"),
        ("metrics.jsonl", '{"round": 1}\n'),
        ("metrics.jsonl", '{"round": 1, "uplink_bytes": 4, "accuracy": "high"}\n'),
        ("metrics.jsonl", b"\xff\xfe\n"),
        ("partition.json", "{"),
        ("partition.json", '{"num_clients": 3, "counts": [[1], [2, 3]]}'),
        ("partition.json", '{"num_clients": 3, "counts": []}'),
        ("metrics.jsonl", None),
    ],
)
def test_a_complete_run_counts_though_another_file_is_damaged(
    runs: Path, name: str, content: str | bytes | None
) -> None:
    path = runs / "full" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    report = Report(runs)
    assert {group.label for group in report.grouping.groups} == {"head", "full"}
    (row,) = [row for row in report.unfinished.rows if row[0].text == "full"]
    assert row[1].text == "complete"
    assert str(path) in row[-1].text
    write_report(runs, report)


def test_a_cell_that_never_began_is_listed_with_its_error(runs: Path) -> None:
    RunDirectory(runs / "cell").write_state(FAILED, 0, error="data.clients: 9 is too many")
    (row,) = [row for row in Report(runs).unfinished.rows if row[0].text == "cell"]
    assert [cell.text for cell in row] == ["cell", "failed", "0", "data.clients: 9 is too many"]


def test_a_directory_of_damaged_runs_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, tree(), curve(0.5)).summary_file.unlink()
    with pytest.raises(ConfigError, match=r"a.summary\.json.*1 more damaged"):
        Report(tmp_path)


def test_missing_or_cut_metrics_do_not_hide_a_result(runs: Path) -> None:
    metrics = runs / "full" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-10])
    (runs / "sweep" / "head" / "metrics.jsonl").unlink()
    report = Report(runs)
    assert [len(group.curve) for group in report.grouping.groups] == [0, 1]
    write_report(runs, report)
