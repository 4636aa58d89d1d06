"""Groups: which runs are averaged."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from fedpeft_dist.reports.groups import Statistic
from fedpeft_dist.reports.report import Report, json_report, markdown_report, run_rows, write_report
from fedpeft_dist.tracking.sweep_axes import AxisChoice, write_axes
from tests.report_fixtures import (
    COHORT,
    DIGITS,
    FULL,
    MIB,
    curve,
    make_run,
    tree,
)


def test_run_rows_are_sorted_by_bytes_and_unfinished_runs_come_last(runs: Path) -> None:
    rows = run_rows(Report(runs).runs)
    assert rows == [
        {
            "run": "sweep/head",
            "state": "complete",
            "method": "head",
            "seed": 1,
            "trained_parameters": 4096,
            "mib_per_client": 4096 * 4 / MIB,
            "mib_total": 4096 * 4 * COHORT * 3 / MIB,
            "share_of_full": 1 / 256,
            "final_accuracy": 0.625,
        },
        {
            "run": "full",
            "state": "complete",
            "method": "full",
            "seed": 1,
            "trained_parameters": FULL,
            "mib_per_client": 4.0,
            "mib_total": 48.0,
            "share_of_full": 1.0,
            "final_accuracy": 0.75,
        },
        {"run": "sweep/lora", "state": "interrupted"},
    ]


def test_a_run_can_be_reported_on_alone(runs: Path) -> None:
    report = Report(runs / "full")
    assert [run.name for run in report.runs] == ["full"]
    assert [point.mib for point in report.runs[0].curve] == [16.0, 48.0]  # round 2's bytes count


def test_timed_runs_have_simulated_hours_in_tables_and_plot(tmp_path: Path) -> None:
    lossy = tree()
    lossy["federation"] |= {"participation": {"dropout": {"name": "random", "after": 0.2}}}
    for seed, seconds in ((1, 900.0), (2, 1800.0)):
        make_run(tmp_path / f"timed-{seed}", tree(seed=seed), curve(0.5), simulated_seconds=seconds)
        make_run(tmp_path / f"lossy-{seed}", lossy | {"seed": seed}, curve(0.5), simulated_seconds=seconds)
    make_run(tmp_path / "untimed", tree("lora", seed=1), curve(0.75))
    report = Report(tmp_path)
    plain, lost = "bias, uniform (dropout none)", "bias, uniform (dropout random)"
    labels = {plain, lost, "lora, uniform (dropout none)"}
    assert {group.label for group in report.grouping.groups} == labels
    assert "Participation" in {table.title for table in report.comparisons}
    hours = {group.label: group.simulated_hours for group in report.grouping.groups}
    assert hours == {plain: 1.5, lost: 1.5, "lora, uniform (dropout none)": None}
    (timed,) = [group for group in report.grouping.groups if group.label == plain]
    assert [point.hours for point in timed.curve] == [0.375, 0.75, 1.125, 1.5]
    table = markdown_report(report).split("\n## ")[0]
    assert "simulated hours" in table
    assert "| 1.5 |" in table
    assert [row["simulated_hours"] for row in json_report(report)["groups"]].count(1.5) == 2
    write_report(tmp_path, report)
    png = (tmp_path / "accuracy_against_bytes.png").read_bytes()
    untimed = Report(tmp_path / "untimed")
    assert "simulated hours" not in markdown_report(untimed)
    write_report(tmp_path / "untimed", untimed)
    widths = [
        int.from_bytes(data[16:20], "big")
        for data in (png, (tmp_path / "untimed" / "accuracy_against_bytes.png").read_bytes())
    ]
    assert widths[0] > widths[1] + 600, "a second picture beside the first"


def test_only_seeds_are_averaged(tmp_path: Path) -> None:
    accuracies = (0.5, 0.75, 0.625)
    for seed, accuracy in zip((1, 42, 3407), accuracies):
        make_run(tmp_path / f"bias-{seed}", tree(seed=seed), curve(accuracy))
        make_run(tmp_path / f"slow-{seed}", tree(seed=seed, client={"optimizer": {"lr": 0.5}}), curve(accuracy / 2))
    slow, fast = sorted(Report(tmp_path).grouping.groups, key=lambda group: group.accuracy.mean)
    assert fast.accuracy == Statistic(statistics.fmean(accuracies), statistics.stdev(accuracies), 3)
    assert str(fast.accuracy) == "0.6250 ± 0.1250"
    assert slow.accuracy.mean == pytest.approx(statistics.fmean(accuracies) / 2)
    assert (fast.label, slow.label) == ("bias, lr 0.01", "bias, lr 0.5")
    assert fast.seeds == [1, 42, 3407]


def test_one_seed_has_no_standard_deviation(runs: Path) -> None:
    group = Report(runs).grouping.groups[0]
    assert group.accuracy == Statistic(0.625, None, 1)
    assert str(group.accuracy) == "0.6250"


def test_a_seed_that_was_run_twice_counts_once(tmp_path: Path) -> None:
    for name, seed, accuracy in (("a", 1, 0.5), ("again", 1, 0.5), ("b", 2, 0.75)):
        make_run(tmp_path / name, tree(seed=seed), curve(accuracy))
    (group,) = Report(tmp_path).grouping.groups
    assert group.accuracy == Statistic(0.625, statistics.stdev((0.5, 0.75)), 2)
    assert len(group.runs) == 3


def test_seeds_from_different_machines_are_one_group(tmp_path: Path) -> None:
    for seed, lanes in ((1, 2), (2, 4)):
        make_run(tmp_path / str(seed), tree(seed=seed, runtime={"lanes": lanes}), curve(0.5))
    (group,) = Report(tmp_path).grouping.groups
    assert (group.accuracy.seeds, group.label) == (2, "bias")


def test_lanes_are_compared_where_a_sweep_varies_them(tmp_path: Path) -> None:
    for lanes in (2, 4):
        run = make_run(tmp_path / str(lanes), tree(runtime={"lanes": lanes}), curve(0.5))
        write_axes(run.path, {"runtime.lanes": AxisChoice(f"lanes{lanes}", ("runtime.lanes",))})
    assert [group.label for group in Report(tmp_path).grouping.groups] == ["bias, lanes 2", "bias, lanes 4"]


def test_neutral_keys_do_not_split_a_group(tmp_path: Path) -> None:
    for seed, root in ((1, "here"), (2, "there")):
        make_run(tmp_path / root, tree(seed=seed, data={**DIGITS, "root": root}, output={"root": root}), curve(0.5))
    assert len(Report(tmp_path).grouping.groups) == 1
