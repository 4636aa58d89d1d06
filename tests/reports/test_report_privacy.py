"""The privacy part of a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from fedpeft_dist.reports.page import script_json
from fedpeft_dist.reports.plot import epsilon_figure
from fedpeft_dist.reports.report import Report, json_report, run_rows, write_report
from tests.report_fixtures import (
    csv_rows,
    curve,
    headings,
    make_run,
    private,
    texts,
    tree,
)

SAID = (
    "train_loss, rejected and accuracy",
    "paper_noise carries no guarantee",
    "sample protects any one training sample",
)


def test_private_runs_have_an_epsilon(privacy_sweep: Path) -> None:
    report = Report(privacy_sweep)
    column = headings(report.main).index("epsilon")
    found = {(row[0], row[1]): row[column] for row in texts(report.main)}
    assert found["head", "none"] == ""
    assert found["head", "sample (epsilon 5)"] == "4.995"
    assert found["full", "paper_noise (no guarantee, nominal epsilon 5)"] == "no guarantee"
    by_run = {row["run"]: row.get("epsilon", "absent") for row in run_rows(report.runs)}
    assert [by_run[f"full-{cell}-1"] for cell in ("none", "sample2", "noise")] == ["absent", 0.999 * 2.0, None]


def test_the_privacy_table_gives_the_protection_of_each_group(privacy_sweep: Path) -> None:
    table = Report(privacy_sweep).privacy
    assert headings(table)[1:] == [
        "mechanism",
        "epsilon",
        "dp_delta",
        "noise multiplier",
        "protects",
        "final accuracy",
        "seeds",
    ]
    assert [row[:6] for row in texts(table) if row[0] == "head"] == [
        ["head", "none", "", "", "", "nothing (no privacy)"],
        ["head", "sample", "1.998", "0.001", "0.5-2", "a sample"],
        ["head", "sample", "4.995", "0.001", "0.2-0.8", "a sample"],
        ["head", "user", "19.98", "0.001", "0.2", "a client"],
        ["head", "paper_noise", "no guarantee", "", "", "nothing"],
    ]
    assert texts(table)[1][-2:] == ["0.4150 ± 0.0071", "2"]
    assert all(words in table.note for words in SAID)


def test_a_group_has_its_runs_largest_epsilon_and_a_range_of_noise(tmp_path: Path) -> None:
    for seed, epsilon in ((1, 2.0), (2, 4.0)):
        config = tree(seed=seed, privacy={"name": "sample", "noise_multiplier": 1.0})
        make_run(tmp_path / str(seed), config, curve(0.5), privacy=private("sample", epsilon))
    (row,) = Report(tmp_path).privacy.rows
    assert [cell.text for cell in row[1:5]] == ["sample", "3.996", "0.001", "0.25-2"]
    assert row[4].value == [0.25, 2.0]


def test_every_format_names_the_values_outside_the_guarantee(privacy_sweep: Path) -> None:
    report = Report(privacy_sweep)
    write_report(privacy_sweep, report)
    for name in ("report.md", "report.html"):
        text = (privacy_sweep / name).read_text()
        assert all(words in text.replace("\n", " ") for words in SAID), name
    (table,) = [table for table in json_report(report)["tables"] if table["kind"] == "guarantees"]
    assert all(words in table["note"] for words in SAID)
    rows = {row["run"]: row for row in csv_rows(privacy_sweep / "report.csv")}
    guarantees = {name: (row["epsilon"], row["guarantee"]) for name, row in rows.items()}
    assert guarantees["head-noise-1"] == ("", "none")
    assert guarantees["head-none-1"] == ("", "")
    assert guarantees["head-sample5-1"] == (str(0.999 * 5.0), "any one training sample")
    assert rows["head-sample5-1"]["outside_guarantee"] == "train_loss, rejected, accuracy"
    groups = csv_rows(privacy_sweep / "report_groups.csv")
    assert [row["epsilon"] for row in groups if "paper_noise" in row["privacy"]] == ["no guarantee"] * 2


def test_json_gives_a_groups_privacy(privacy_sweep: Path) -> None:
    found = {group["label"]: group["privacy"] for group in json_report(Report(privacy_sweep))["groups"]}
    assert found["head, privacy none"] is None
    noise = found["head, privacy paper_noise (no guarantee, nominal epsilon 5)"]
    assert (noise["mechanism"], noise["epsilon"], noise["guarantee"]) == ("paper_noise", None, "none")
    sample = found["head, privacy sample (epsilon 2)"]
    assert (sample["epsilon"], sample["dp_delta"], sample["noise_multiplier"]) == (0.999 * 2.0, 1e-3, [0.5, 2.0])


def test_groups_without_a_guarantee_are_not_on_the_epsilon_axis(privacy_sweep: Path) -> None:
    (picture,) = Report(privacy_sweep).epsilon_pictures
    head, full = picture["lines"]
    assert (head["label"], full["label"]) == ("head", "full")
    on_axis = {name: [group.epsilon for group in groups] for name, groups in head["guaranteed"].items()}
    assert on_axis == {"sample": [0.999 * 2.0, 0.999 * 5.0], "user": [0.999 * 20.0]}
    assert [group.mechanism for group in head["unguaranteed"]] == ["paper_noise"]
    assert [group.accuracy.mean for group in head["public"]] == [pytest.approx(0.815)]
    drawn = json.loads(script_json(picture))["lines"][0]
    assert [point[0] for point in drawn["guaranteed"]["sample"]] == [1.998, 4.995]
    assert [point[0] for point in (*drawn["unguaranteed"], *drawn["public"])] == [None, None]


def test_the_picture_of_epsilon(privacy_sweep: Path) -> None:
    """Lines at their epsilons, a horizontal one for no privacy, and noise without a guarantee in the field beside."""
    report = Report(privacy_sweep)
    axes, beside = epsilon_figure(report.epsilon_pictures).axes
    sample, user = [0.999 * 2.0, 0.999 * 5.0], [0.999 * 20.0]
    assert axes.get_xscale() == "log"
    assert [list(found.lines[0].get_xdata()) for found in axes.containers] == [sample, user, sample]
    assert [len(found.lines[0].get_xdata()) for found in beside.containers] == [1, 1]
    across = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert across == [pytest.approx(0.815), pytest.approx(0.915)]
    write_report(privacy_sweep, report)
    assert imread(privacy_sweep / "accuracy_against_epsilon.png").shape[0] > 300


def test_each_data_set_has_an_epsilon_picture(privacy_sweep: Path) -> None:
    for seed in (1, 2):
        config = tree(seed=seed, data={"name": "glyphs", "clients": 16}, privacy={"name": "sample", "epsilon": 5.0})
        make_run(privacy_sweep / f"glyphs-{seed}", config, curve(0.5), privacy=private("sample", 5.0))
    report = Report(privacy_sweep)
    assert sorted(len(picture["lines"]) for picture in report.epsilon_pictures) == [1, 2]
    assert len({picture["title"] for picture in report.epsilon_pictures}) == 2
    assert headings(report.privacy)[1] == "data set"


def test_a_report_without_private_runs_does_not_mention_privacy(runs: Path) -> None:
    report = Report(runs)
    assert (report.privacy.rows, report.epsilon_pictures) == ([], [])
    written = write_report(runs, report)
    assert "accuracy_against_epsilon.png" not in {path.name for path in written}
    assert "uarantee" not in (runs / "report.md").read_text()


def test_paper_noise_at_two_epsilons_makes_two_groups(tmp_path: Path) -> None:
    for epsilon in (5.0, 8.0):
        config = tree(privacy={"name": "paper_noise", "epsilon": epsilon})
        make_run(tmp_path / str(epsilon), config, curve(0.5), privacy=private("paper_noise", epsilon))
    report = Report(tmp_path)
    assert len(report.grouping.groups) == 2
    assert report.epsilon_pictures == []  # nothing here has an epsilon
