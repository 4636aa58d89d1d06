"""The files that a report writes, and what the command prints."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft_dist import cli
from fedpeft_dist.reports.report import Report, json_report, markdown_report, run_rows, write_report
from fedpeft_dist.reports.tables import csv_table
from tests.report_fixtures import (
    COHORT,
    DIGITS,
    csv_rows,
    curve,
    make_run,
    tree,
)


def test_markdown(runs: Path) -> None:
    lines = markdown_report(Report(runs)).splitlines()
    assert lines[0] == f"# Runs below {runs.name}"
    assert lines[2].startswith("| method | trained parameters | clients a round |")
    assert lines[3].startswith("| --- | ---: | ---: |")
    assert lines[4] == "| head | 4,096 | 4 | 0.0156 | 0.062 | 0.19 | 0.39% | 0.6250 | 1 |"
    assert "![Accuracy against bytes](accuracy_against_bytes.png)" in lines


def test_csv_has_unrounded_numbers_and_every_key_that_varies(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", tree(seed=seed, client={"epochs": seed}), curve(1 / 3))
    write_report(tmp_path, Report(tmp_path))
    rows = csv_rows(tmp_path / "report.csv")
    assert [row["client.epochs"] for row in rows] == ["1", "2"]
    assert "client.batch_size" not in rows[0]
    assert float(rows[0]["final_accuracy"]) == 1 / 3
    assert rows[0]["weights_sha256"] != rows[1]["weights_sha256"]
    assert {"seed", "best_accuracy", "samples_per_second", "trainable_parameters", "uplink_bytes_total"} <= set(rows[0])
    groups = csv_rows(tmp_path / "report_groups.csv")
    assert [float(group["final accuracy"]) for group in groups] == [1 / 3, 1 / 3]


def test_csv_and_json_keep_the_type_of_every_key(tmp_path: Path) -> None:
    """Whole numbers, booleans, fractions, texts and null, each as its config has it, in every column of an axis."""
    both = (
        {"max_train": 300, "epochs": 2, "steps": None, "nesterov": True, "proximal": 2.0, "rounds": 3},
        {"max_train": 500, "epochs": 10, "steps": 7, "nesterov": False, "proximal": 0.5, "rounds": 12},
    )
    for number, values in enumerate(both):
        sections = {
            "data": {**DIGITS, "max_train": values["max_train"]},
            "federation": {"rounds": values["rounds"], "cohort": COHORT},
            "client": {key: values[key] for key in ("epochs", "steps", "proximal")},
        }
        sections["client"]["optimizer"] = {"nesterov": values["nesterov"]}
        make_run(tmp_path / f"run{number}", tree(**sections), curve(0.5))
    report = Report(tmp_path)
    table = json_report(report)["tables"][0]
    shown = [dict(zip(table["columns"], row)) for row in table["rows"]]
    expected = [{**values, "steps": values["steps"] or "null"} for values in both]
    assert [{key: repr(row[key]) for key in both[0]} for row in shown] == [
        {key: repr(value) for key, value in values.items()} for values in expected
    ]
    counts = ("trained parameters", "clients a round", "seeds")
    assert all(type(row[key]) is int for row in shown for key in counts)
    write_report(tmp_path, report)
    rows = csv_rows(tmp_path / "report_groups.csv")
    assert [{key: row[key] for key in both[0]} for row in rows] == [
        {key: str(value) for key, value in values.items()} for values in expected
    ]


def test_csv_has_mean_and_spread_in_two_columns(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", tree(seed=seed), curve(seed / 4))
    (row,) = csv.DictReader(csv_table(Report(tmp_path).main).splitlines())
    assert (float(row["final accuracy"]), row["seeds"]) == (0.375, "2")
    assert float(row["std"]) == statistics.stdev((0.25, 0.5))


def test_json_is_one_object(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fedpeft", "report", str(runs), "--json"])
    before = sorted(runs.rglob("*"))
    cli.main()
    found = json.loads(capsys.readouterr().out)
    assert sorted(runs.rglob("*")) == before
    assert found["runs"] == run_rows(Report(runs).runs)
    assert [group["final_accuracy"] for group in found["groups"]] == [
        {"mean": 0.625, "std": None},
        {"mean": 0.75, "std": None},
    ]
    assert found["groups"][0]["runs"] == ["sweep/head"]
    main, communication = found["tables"]
    assert main["columns"][0] == "method"
    assert main["rows"][0][-2] == {"mean": 0.625, "std": None, "seeds": 1, "group": "head"}
    assert communication["kind"] == "communication"


def test_the_command_prints_tables_and_the_files_it_wrote(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedpeft", "report", str(runs)])
    cli.main()
    printed = capsys.readouterr().out
    for words in ("All groups", "Communication", "Unfinished runs", "0.6250", "interrupted"):
        assert words in printed
    written = [line.removeprefix("written: ") for line in printed.splitlines() if line.startswith("written: ")]
    names = ["report.md", "report.csv", "report_groups.csv", "accuracy_against_bytes.png", "report.html"]
    assert [Path(path).name for path in written] == names
    assert all(Path(path).stat().st_size for path in written)


def test_a_second_report_ignores_the_files_of_the_first(runs: Path) -> None:
    first = write_report(runs, Report(runs))
    again = Report(runs)
    assert len(again.runs) == 3
    assert write_report(runs, again) == first


def test_reading_runs_imports_nothing_heavy(runs: Path) -> None:
    probe = (
        "import sys; from pathlib import Path; from fedpeft_dist.reports.report import Report, json_report; "
        f"json_report(Report(Path({str(runs)!r}))); "
        "print([name for name in ('torch', 'timm', 'matplotlib', 'torchvision') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout == "[]\n"
