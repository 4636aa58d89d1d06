"""Reports: which runs are averaged, what the tables compare, what is written, and what is said of damaged runs."""

from __future__ import annotations

import csv
import json
import random
import statistics
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from fedpeft_dist import cli
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import parse_config
from fedpeft_dist.reports import runs as report_runs
from fedpeft_dist.reports.axes import short_names
from fedpeft_dist.reports.comparisons import comparison_tables
from fedpeft_dist.reports.formats import csv_text
from fedpeft_dist.reports.groups import Statistic, group_runs
from fedpeft_dist.reports.page import MAX_POINTS, epsilon_data, line_data, script_json
from fedpeft_dist.reports.partitions import partition_pictures
from fedpeft_dist.reports.plot import accuracy_figure, epsilon_figure
from fedpeft_dist.reports.report import Report, json_report, make_report, run_rows
from fedpeft_dist.reports.table import Table
from fedpeft_dist.reports.terminal import rich_tables
from fedpeft_dist.reports.writing import markdown_report, write_report
from fedpeft_dist.tracking.run_directory import FAILED, INTERRUPTED, RunDirectory
from fedpeft_dist.tracking.sweep_axes import AxisChoice, write_axes
from tests.report_fixtures import FULL, PARAMETERS, curve, make_privacy_sweep, make_run, partition_counts, private

MIB, COHORT = 2**20, 4
DIGITS = {"name": "digits", "clients": 16}


def tree(method: str = "bias", seed: int = 1, **sections: Any) -> dict[str, Any]:
    federation = {"rounds": 3, "cohort": COHORT}
    return {"seed": seed, "method": {"name": method}, "data": DIGITS, "federation": federation, **sections}


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def headings(table: Table) -> list[str]:
    return [column.heading for column in table.columns]


def tables(report: Report, kind: str) -> list[Table]:
    return [table for table in report.comparisons if table.kind == kind]


def csv_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_run(tmp_path / "full", tree("full"), (0.25, None, 0.75))
    make_run(tmp_path / "sweep" / "head", tree("head"), (0.25, None, 0.625))
    make_run(tmp_path / "sweep" / "lora", tree("lora"), state=INTERRUPTED)
    return tmp_path


# --- rows and groups ---------------------------------------------------------------------------------------------


def test_rows_come_with_the_fewest_bytes_first_and_unfinished_runs_last(runs: Path) -> None:
    rows = run_rows(make_report(runs).runs)
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
    report = make_report(runs / "full")
    assert [run.name for run in report.runs] == ["full"]
    assert [point.mib_sent for point in report.runs[0].curve] == [16.0, 48.0]  # round 2's bytes count


def test_accuracy_stands_against_simulated_hours_where_runs_have_them(tmp_path: Path) -> None:
    lossy = tree()
    lossy["federation"] |= {"participation": {"dropout": {"name": "random", "after": 0.2}}}
    for seed, seconds in ((1, 900.0), (2, 1800.0)):
        make_run(tmp_path / f"timed-{seed}", tree(seed=seed), curve(0.5), simulated_seconds=seconds)
        make_run(tmp_path / f"lossy-{seed}", lossy | {"seed": seed}, curve(0.5), simulated_seconds=seconds)
    make_run(tmp_path / "untimed", tree("lora", seed=1), curve(0.75))
    report = make_report(tmp_path)
    plain, lost = "bias, uniform (dropout none)", "bias, uniform (dropout random)"
    labels = {plain, lost, "lora, uniform (dropout none)"}
    assert {group.label for group in report.grouping.groups} == labels
    assert "Participation" in {table.title for table in report.comparisons}
    hours = {group.label: group.simulated_hours for group in report.grouping.groups}
    assert hours == {plain: 1.5, lost: 1.5, "lora, uniform (dropout none)": None}
    (timed,) = [group for group in report.grouping.groups if group.label == plain]
    assert [point.hours for point, _ in timed.curve()] == [0.375, 0.75, 1.125, 1.5]
    table = markdown_report(report).split("\n## ")[0]
    assert "simulated hours" in table
    assert "| 1.5 |" in table
    assert [row["simulated_hours"] for row in json_report(report)["groups"]].count(1.5) == 2
    write_report(tmp_path, report)
    png = (tmp_path / "accuracy_against_bytes.png").read_bytes()
    untimed = make_report(tmp_path / "untimed")
    assert "simulated hours" not in markdown_report(untimed)
    write_report(tmp_path / "untimed", untimed)
    widths = [
        int.from_bytes(data[16:20], "big")
        for data in (png, (tmp_path / "untimed" / "accuracy_against_bytes.png").read_bytes())
    ]
    assert widths[0] > widths[1] + 600, "a second picture beside the first"


def test_seeds_are_averaged_and_nothing_else_is(tmp_path: Path) -> None:
    accuracies = (0.5, 0.75, 0.625)
    for seed, accuracy in zip((1, 42, 3407), accuracies):
        make_run(tmp_path / f"bias-{seed}", tree(seed=seed), curve(accuracy))
        make_run(tmp_path / f"slow-{seed}", tree(seed=seed, client={"optimizer": {"lr": 0.5}}), curve(accuracy / 2))
    slow, fast = sorted(make_report(tmp_path).grouping.groups, key=lambda group: group.accuracy.mean)
    assert fast.accuracy == Statistic(statistics.fmean(accuracies), statistics.stdev(accuracies), 3)
    assert str(fast.accuracy) == "0.6250 ± 0.1250"
    assert slow.accuracy.mean == pytest.approx(statistics.fmean(accuracies) / 2)
    assert (fast.label, slow.label) == ("bias, lr 0.01", "bias, lr 0.5")
    assert fast.seeds == [1, 42, 3407]


def test_one_seed_has_no_standard_deviation(runs: Path) -> None:
    group = make_report(runs).grouping.groups[0]
    assert group.accuracy == Statistic(0.625, None, 1)
    assert str(group.accuracy) == "0.6250"


def test_a_seed_that_was_run_twice_counts_once(tmp_path: Path) -> None:
    for name, seed, accuracy in (("a", 1, 0.5), ("again", 1, 0.5), ("b", 2, 0.75)):
        make_run(tmp_path / name, tree(seed=seed), curve(accuracy))
    (group,) = make_report(tmp_path).grouping.groups
    assert group.accuracy == Statistic(0.625, statistics.stdev((0.5, 0.75)), 2)
    assert len(group.runs) == 3


def test_seeds_from_different_machines_are_one_group(tmp_path: Path) -> None:
    for seed, lanes in ((1, 2), (2, 4)):
        make_run(tmp_path / str(seed), tree(seed=seed, runtime={"lanes": lanes}), curve(0.5))
    (group,) = make_report(tmp_path).grouping.groups
    assert (group.accuracy.seeds, group.label) == (2, "bias")


def test_lanes_are_compared_where_a_sweep_varies_them(tmp_path: Path) -> None:
    for lanes in (2, 4):
        run = make_run(tmp_path / str(lanes), tree(runtime={"lanes": lanes}), curve(0.5))
        write_axes(run.path, {"runtime.lanes": AxisChoice(f"lanes{lanes}", ("runtime.lanes",))})
    assert [group.label for group in make_report(tmp_path).grouping.groups] == ["bias, lanes 2", "bias, lanes 4"]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep's cells. Its methods have rates of their own, and its partitions are called even and uneven."""
    partitions = {"even": {"name": "iid"}, "uneven": {"name": "dirichlet", "alpha": 0.1}}
    for method, lr in (("small", 0.5), ("large", 0.1)):
        for name, partition in partitions.items():
            for cohort in (2, 4):
                sections = {"data": {**DIGITS, "partition": partition}, "client": {"optimizer": {"lr": lr}}}
                sections["federation"] = {"rounds": 3, "cohort": cohort}
                config = tree({"small": "head", "large": "lora"}[method], **sections)
                run = make_run(tmp_path / f"{method}-{name}-{cohort}", config, curve(0.5))
                choices = {
                    "method": AxisChoice(method, ("method.name", "client.optimizer.lr")),
                    "split": AxisChoice(name, ("data.partition.name", "data.partition.alpha")),
                    "federation.cohort": AxisChoice(f"cohort{cohort}", ("federation.cohort",)),
                }
                write_axes(run.path, choices)
    return tmp_path


def test_a_sweeps_axes_and_choices_are_the_reports(sweep: Path) -> None:
    report = make_report(sweep)
    assert headings(report.main)[:4] == ["method", "split", "cohort", "trained parameters"]
    assert [row[:3] for row in texts(report.main)] == [
        [method, split, cohort]
        for method in ("small", "large")
        for cohort in ("2", "4")
        for split in ("even", "uneven")
    ]
    assert report.main.rows[0][2].value == 2
    assert {group.label for group in report.grouping.groups if group.method == "small"} == {
        f"small, {split}, cohort {cohort}" for split in ("even", "uneven") for cohort in (2, 4)
    }
    (table,) = tables(report, "split")
    assert (table.title, table.note, headings(table)) == ("By split", "", ["method", "even", "uneven"])
    assert [row[0] for row in texts(table)] == [
        f"{method}, cohort {cohort}" for cohort in (2, 4) for method in ("small", "large")
    ]


def test_one_run_that_is_no_cell_takes_all_axes_from_the_configs(sweep: Path) -> None:
    make_run(sweep / "further", tree("full"), curve(0.5))
    report = make_report(sweep)
    assert headings(report.main)[:4] == ["method", "clients", "partition", "lr"]
    assert "head, N=16, M=2, iid" in {group.label for group in report.grouping.groups}


def test_choices_that_name_two_groups_alike_are_not_used(sweep: Path) -> None:
    for path in sweep.iterdir():
        write_axes(path, {"method": AxisChoice("one", ("method.name",))})
    assert len({group.label for group in make_report(sweep).grouping.groups}) == 8


def test_a_damaged_sweep_file_is_named_and_changes_no_result(sweep: Path) -> None:
    (sweep / "small-even-2" / "sweep.json").write_text("{")
    report = make_report(sweep)
    assert len(report.grouping.groups) == 8
    ((name, state, _, problem),) = texts(report.unfinished)
    assert (name, state) == ("small-even-2", "complete")
    assert "sweep.json" in problem


def test_what_a_run_does_not_depend_on_sets_no_groups_apart(tmp_path: Path) -> None:
    for seed, root in ((1, "here"), (2, "there")):
        make_run(tmp_path / root, tree(seed=seed, data={**DIGITS, "root": root}, output={"root": root}), curve(0.5))
    assert len(make_report(tmp_path).grouping.groups) == 1


def test_a_method_is_called_by_its_name_and_the_values_that_differ(tmp_path: Path) -> None:
    methods = [
        {"name": "adapter"},
        {"name": "adapter", "bottleneck": 8, "shared": False},
        {"name": "prompt"},
        {"name": "prompt", "depth": "shallow"},
    ]
    for number, method in enumerate(methods):
        make_run(tmp_path / str(number), tree() | {"method": method}, curve(0.5))
    make_run(tmp_path / "full", tree("full"), curve(0.5))
    make_run(tmp_path / "scratch", tree("full", backbone={"pretrained": False}), curve(0.5))
    assert {group.label for group in make_report(tmp_path).grouping.groups} == {
        "adapter (bottleneck 96)",
        "adapter (bottleneck 8)",
        "prompt (depth deep)",
        "prompt (depth shallow)",
        "full (pretrained true)",
        "full (pretrained false)",
    }


def test_checkpoints_are_told_by_their_files(tmp_path: Path) -> None:
    for number, path in enumerate((None, "/a/b/mae.pth", "/a/c/mae.pth", "/a/moco.npz")):
        make_run(tmp_path / str(number), tree(backbone={"name": "vit", "checkpoint": path}), curve(0.5))
    labels = {group.axes["backbone"] for group in make_report(tmp_path).grouping.groups}
    assert labels == {"vit", *(f"vit (checkpoint /a/{file})" for file in ("b/mae.pth", "c/mae.pth", "moco.npz"))}


def test_groups_have_labels_of_their_own_whatever_they_differ_in(tmp_path: Path) -> None:
    trees = [
        tree(),
        tree(backbone={"model_args": {"drop_path_rate": 0.1}}),
        tree(backbone={"model_args": {"depth": 2}}),
        tree(server={"optimizer": {"lr": 0.5}}),
        tree(client={"optimizer": {"name": "adamw"}}),
        tree(client={"steps": 5}),
        tree(data={**DIGITS, "partition": {"name": "iid"}}),
        tree(data={**DIGITS, "partition": {"name": "dirichlet", "min_samples": 1}}),
        tree(data={**DIGITS, "max_train": 500}),
        tree(data={"name": "cifar100"}),
        tree(federation={"rounds": 5, "cohort": COHORT}),
        tree(federation={"rounds": 3, "cohort": 2}),
    ]
    for number, one in enumerate(trees):
        make_run(tmp_path / str(number), one, curve(0.5))
    report = make_report(tmp_path)
    assert len({group.label for group in report.grouping.groups}) == len(trees)
    for table in report.comparisons:
        for row in table.rows:
            cells = [cell.value["group"] for cell in row if isinstance(cell.value, dict)]
            assert len(cells) == len(set(cells))


def test_no_mixture_of_experiments_puts_two_groups_into_one_cell() -> None:
    """In random mixtures a group has a label of its own, no row or title comes twice, no cell holds two groups."""
    draw = random.Random(0)
    choices: dict[str, list[Any]] = {
        "seed": [1, 2],
        "method": [{"name": "bias"}, {"name": "full"}, {"name": "lora"}, {"name": "lora", "rank": 4}],
        "backbone": [{}, {}, {"pretrained": False}, {"checkpoint": "x.pth"}, {"model_args": {"depth": 2}}],
        "data": [
            {"name": name, "clients": clients, "partition": partition, "max_train": max_train}
            for name in ("cifar100", "pcam")
            for clients in (64, 16)
            for partition in ({"name": "iid"}, {"name": "dirichlet"}, {"name": "dirichlet", "min_samples": 1})
            for max_train in (None, None, 1000)
        ],
        "federation": [{"cohort": 8}, {"cohort": 8}, {"cohort": 16}, {"rounds": 10}],
        "client": [{}, {}, {"optimizer": {"lr": 0.1}}, {"optimizer": {"name": "adamw"}}],
        "runtime": [{}, {"lanes": 2}],
    }
    for _ in range(40):
        runs = []
        for number in range(draw.choice((2, 6, 30))):
            config = parse_config({key: draw.choice(found) for key, found in choices.items()}, "test")
            size = draw.choice((100, 200))
            counted = {"trainable_parameters": size, "backbone_parameters": 1000, "uplink_bytes_total": size}
            summary = {"method": config.method.name, "final_accuracy": draw.random(), **counted}
            runs.append(report_runs.Run(str(number), "complete", report_runs.report_keys(config), summary))
        grouping = group_runs(runs)
        found = comparison_tables(grouping)
        assert len({group.label for group in grouping.groups}) == len(grouping.groups)
        assert len({table.title for table in found}) == len(found)
        for table in found:
            cells = [cell.value["group"] for row in table.rows for cell in row if isinstance(cell.value, dict)]
            assert len(cells) == len(set(cells))
            names = [tuple(cell.text for cell in row if not isinstance(cell.value, dict)) for row in table.rows]
            assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["client.optimizer.lr", "federation.rounds"], ["lr", "rounds"]),
        (["client.optimizer.lr", "server.optimizer.lr"], ["client.optimizer.lr", "server.optimizer.lr"]),
        (["client.optimizer.name", "server.momentum"], ["optimizer", "momentum"]),
        (["clients", "data.clients"], ["clients", "data.clients"]),
    ],
)
def test_keys_are_shortened_as_far_as_they_stay_apart(keys: list[str], expected: list[str]) -> None:
    assert list(short_names(keys).values()) == expected


# --- tables ------------------------------------------------------------------------------------------------------


def test_the_main_table(runs: Path) -> None:
    table = make_report(runs).main
    assert headings(table) == [
        "method",
        "trained parameters",
        "clients a round",
        "MiB per client and round",
        "MiB a round",
        "total MiB",
        "share of full's bytes",
        "final accuracy",
        "seeds",
    ]
    assert texts(table) == [
        ["head", "4,096", "4", "0.0156", "0.062", "0.19", "0.39%", "0.6250", "1"],
        ["full", "1,048,576", "4", "4.0000", "16.000", "48.00", "100.00%", "0.7500", "1"],
    ]


def test_the_main_table_shows_the_keys_that_vary_and_no_others(tmp_path: Path) -> None:
    for method, lr in (("head", 0.1), ("bias", 0.2)):
        for alpha in (0.1, 0.5):
            data = {**DIGITS, "partition": {"name": "dirichlet", "alpha": alpha}}
            make_run(
                tmp_path / f"{method}{alpha}", tree(method, data=data, client={"optimizer": {"lr": lr}}), curve(0.5)
            )
    table = make_report(tmp_path).main
    assert headings(table)[:4] == ["method", "partition", "lr", "trained parameters"]
    assert [row[:3] for row in texts(table)] == [
        ["head", "dirichlet (alpha 0.1)", "0.1"],
        ["head", "dirichlet (alpha 0.5)", "0.1"],
        ["bias", "dirichlet (alpha 0.1)", "0.2"],
        ["bias", "dirichlet (alpha 0.5)", "0.2"],
    ]
    assert table.note == "Varies along with these: client.optimizer.lr."


def test_the_communication_table_is_the_papers(tmp_path: Path) -> None:
    """Cohorts are rows and data sets are columns. Each data set has its own alpha, which splits no row."""
    for data, alpha, extra in (("cifar100", 0.1, 100), ("pcam", 0.5, 2)):
        for method, cohort in (("full", 8), ("full", 1), ("head", 8)):
            for seed in (1, 42):
                config = tree(
                    method,
                    seed,
                    data={"name": data, "clients": 64, "partition": {"name": "dirichlet", "alpha": alpha}},
                    federation={"cohort": cohort},
                )
                accuracy = 0.5 + seed / 1000 + cohort / 100
                path = tmp_path / data / f"{method}-{cohort}-{seed}"
                make_run(path, config, curve(accuracy), parameters=PARAMETERS[method] * 25 + extra)
    (table,) = tables(make_report(tmp_path), "communication")
    assert headings(table) == [
        "method",
        "tuned parameters x clients",
        "MiB a round",
        "cifar100",
        "pcam",
    ]
    assert table.note == "Varies along with these: partition."
    assert texts(table) == [
        ["head, N=64, M=8", "0.10M x 8", "3.13", "0.6015 ± 0.0290", "0.6015 ± 0.0290"],
        ["full, N=64, M=1", "26.21M x 1", "100.00", "0.5315 ± 0.0290", "0.5315 ± 0.0290"],
        ["full, N=64, M=8", "26.21M x 8", "800.00", "0.6015 ± 0.0290", "0.6015 ± 0.0290"],
    ]
    assert table.rows[0][2].value == [pytest.approx((102400 + extra) * 32 / MIB) for extra in (2, 100)]


def test_client_stability_and_distribution_have_a_row_for_each_setting(tmp_path: Path) -> None:
    accuracy, expected = 0.1, {}
    for partition in ({"name": "dirichlet", "alpha": 0.1}, {"name": "iid"}):
        for clients, cohort in ((64, 8), (64, 64), (16, 16), (16, 2)):
            for method in ("head", "bias"):
                data = {"name": "cifar100", "clients": clients, "partition": partition}
                name = f"{partition['name']}-{clients}-{cohort}-{method}"
                make_run(tmp_path / name, tree(method, data=data, federation={"cohort": cohort}), curve(accuracy))
                expected[name] = f"{accuracy:.4f}"
                accuracy += 0.01
    report = make_report(tmp_path)
    (clients,) = tables(report, "clients")
    assert clients.title == "Client stability"
    assert headings(clients) == ["method", "N=16, M=2", "N=16, M=16", "N=64, M=8", "N=64, M=64"]
    cells = ("16-2", "16-16", "64-8", "64-64")
    assert texts(clients) == [
        [f"{method}, {label}", *(expected[f"{name}-{cell}-{method}"] for cell in cells)]
        for name, label in (("dirichlet", "dirichlet (alpha 0.1)"), ("iid", "iid"))
        for method in ("head", "bias")
    ]
    (distributions,) = tables(report, "partition")
    assert distributions.title == "Data distribution"
    assert headings(distributions) == ["method", "dirichlet (alpha 0.1)", "iid"]
    first = ["head, N=16, M=2", expected["dirichlet-16-2-head"], expected["iid-16-2-head"]]
    assert (texts(distributions)[0], len(distributions.rows)) == (first, 8)


def test_data_scale_has_a_table(tmp_path: Path) -> None:
    for max_train, accuracy in ((1000, 0.25), (5000, 0.375), (None, 0.5)):
        data = {"name": "cifar100", "max_train": max_train, "partition": {"name": "dirichlet", "min_samples": 1}}
        make_run(tmp_path / f"scale-{max_train}", tree(data=data), curve(accuracy))
    (table,) = tables(make_report(tmp_path), "data.max_train")
    assert (table.title, headings(table)) == ("Data scale", ["method", "1000", "5000", "all"])
    assert texts(table) == [["bias", "0.2500", "0.3750", "0.5000"]]


def test_backbones_have_a_table(tmp_path: Path) -> None:
    for name, accuracy in (("vit_base_patch16_224.mae", 0.75), ("vit_base_patch16_224.augreg_in21k", 0.5)):
        make_run(tmp_path / name, tree(backbone={"name": name}, data={"name": "cifar100"}), curve(accuracy))
    (table,) = tables(make_report(tmp_path), "backbone")
    assert texts(table) == [["bias", "0.5000", "0.7500"]]


def test_an_option_that_differs_too_is_told_in_the_row_and_merges_nothing(tmp_path: Path) -> None:
    for partition in ("dirichlet", "iid"):
        for lr, accuracy in ((0.1, 0.25), (0.2, 0.75)):
            data = {**DIGITS, "partition": {"name": partition}}
            config = tree(data=data, client={"optimizer": {"lr": lr}})
            make_run(tmp_path / f"{partition}{lr}", config, curve(accuracy))
    report = make_report(tmp_path)
    (table,) = tables(report, "partition")
    assert texts(table) == [["bias, lr 0.1", "0.2500", "0.2500"], ["bias, lr 0.2", "0.7500", "0.7500"]]
    (by_rate,) = tables(report, "client.optimizer.lr")
    assert (by_rate.title, headings(by_rate)) == ("By lr", ["method", "0.1", "0.2"])
    assert [row[0] for row in texts(by_rate)] == ["bias, dirichlet (alpha 0.1)", "bias, iid"]


def test_nothing_to_compare_makes_no_tables(tmp_path: Path) -> None:
    make_run(tmp_path / "one", tree(), curve(0.5))
    assert make_report(tmp_path).comparisons == ()


# --- privacy -----------------------------------------------------------------------------------------------------

SAID = (
    "train_loss, rejected and accuracy",
    "paper_noise carries no guarantee",
    "sample protects any one training sample",
)


@pytest.fixture
def privacy_sweep(tmp_path: Path) -> Path:
    make_privacy_sweep(tmp_path)
    return tmp_path


def test_epsilon_is_shown_where_a_run_was_private(privacy_sweep: Path) -> None:
    report = make_report(privacy_sweep)
    column = headings(report.main).index("epsilon")
    found = {(row[0], row[1]): row[column] for row in texts(report.main)}
    assert found["head", "none"] == ""
    assert found["head", "sample (epsilon 5)"] == "4.995"
    assert found["full", "paper_noise (no guarantee, nominal epsilon 5)"] == "no guarantee"
    by_run = {row["run"]: row.get("epsilon", "absent") for row in run_rows(report.runs)}
    assert [by_run[f"full-{cell}-1"] for cell in ("none", "sample2", "noise")] == ["absent", 0.999 * 2.0, None]


def test_the_privacy_table_tells_who_is_protected_how_well(privacy_sweep: Path) -> None:
    table = make_report(privacy_sweep).privacy
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


def test_the_largest_epsilon_of_a_groups_runs_counts_and_its_noise_is_a_range(tmp_path: Path) -> None:
    for seed, epsilon in ((1, 2.0), (2, 4.0)):
        config = tree(seed=seed, privacy={"name": "sample", "noise_multiplier": 1.0})
        make_run(tmp_path / str(seed), config, curve(0.5), privacy=private("sample", epsilon))
    (row,) = make_report(tmp_path).privacy.rows
    assert [cell.text for cell in row[1:5]] == ["sample", "3.996", "0.001", "0.25-2"]
    assert row[4].value == [0.25, 2.0]


def test_what_no_guarantee_covers_is_said_in_every_format(privacy_sweep: Path) -> None:
    report = make_report(privacy_sweep)
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


def test_json_tells_a_groups_privacy(privacy_sweep: Path) -> None:
    found = {group["label"]: group["privacy"] for group in json_report(make_report(privacy_sweep))["groups"]}
    assert found["head, privacy none"] is None
    noise = found["head, privacy paper_noise (no guarantee, nominal epsilon 5)"]
    assert (noise["mechanism"], noise["epsilon"], noise["guarantee"]) == ("paper_noise", None, "none")
    sample = found["head, privacy sample (epsilon 2)"]
    assert (sample["epsilon"], sample["dp_delta"], sample["noise_multiplier"]) == (0.999 * 2.0, 1e-3, [0.5, 2.0])


def test_what_has_no_guarantee_has_no_place_on_the_axis_of_epsilon(privacy_sweep: Path) -> None:
    (picture,) = make_report(privacy_sweep).epsilon_pictures
    head, full = picture.lines
    assert (head.label, full.label) == ("head", "full")
    on_axis = {name: [group.epsilon for group in groups] for name, groups in head.guaranteed.items()}
    assert on_axis == {"sample": [0.999 * 2.0, 0.999 * 5.0], "user": [0.999 * 20.0]}
    assert [group.mechanism for group in head.unguaranteed] == ["paper_noise"]
    assert [group.accuracy.mean for group in head.public] == [pytest.approx(0.815)]
    drawn = epsilon_data(picture)["lines"][0]
    assert [point[0] for point in drawn["guaranteed"]["sample"]] == [1.998, 4.995]
    assert [point[0] for point in (*drawn["unguaranteed"], *drawn["public"])] == [None, None]


def test_the_picture_of_epsilon(privacy_sweep: Path) -> None:
    """Lines at their epsilons, a horizontal one for no privacy, and noise without a guarantee in the field beside."""
    report = make_report(privacy_sweep)
    axes, beside = epsilon_figure(report.epsilon_pictures).axes
    sample, user = [0.999 * 2.0, 0.999 * 5.0], [0.999 * 20.0]
    assert axes.get_xscale() == "log"
    assert [list(found.lines[0].get_xdata()) for found in axes.containers] == [sample, user, sample]
    assert [len(found.lines[0].get_xdata()) for found in beside.containers] == [1, 1]
    across = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert across == [pytest.approx(0.815), pytest.approx(0.915)]
    write_report(privacy_sweep, report)
    assert imread(privacy_sweep / "accuracy_against_epsilon.png").shape[0] > 300


def test_two_data_sets_have_a_picture_each(privacy_sweep: Path) -> None:
    for seed in (1, 2):
        config = tree(seed=seed, data={"name": "glyphs", "clients": 16}, privacy={"name": "sample", "epsilon": 5.0})
        make_run(privacy_sweep / f"glyphs-{seed}", config, curve(0.5), privacy=private("sample", 5.0))
    report = make_report(privacy_sweep)
    assert sorted(len(picture.lines) for picture in report.epsilon_pictures) == [1, 2]
    assert len({picture.title for picture in report.epsilon_pictures}) == 2
    assert headings(report.privacy)[1] == "data set"


def test_nothing_is_said_of_privacy_where_there_is_none(runs: Path) -> None:
    report = make_report(runs)
    assert (report.privacy.rows, report.epsilon_pictures) == ((), ())
    written = write_report(runs, report)
    assert "accuracy_against_epsilon.png" not in {path.name for path in written}
    assert "uarantee" not in (runs / "report.md").read_text()


def test_noise_that_is_tried_at_two_epsilons_makes_two_groups(tmp_path: Path) -> None:
    for epsilon in (5.0, 8.0):
        config = tree(privacy={"name": "paper_noise", "epsilon": epsilon})
        make_run(tmp_path / str(epsilon), config, curve(0.5), privacy=private("paper_noise", epsilon))
    report = make_report(tmp_path)
    assert len(report.grouping.groups) == 2
    assert report.epsilon_pictures == ()  # nothing here has an epsilon


# --- time to accuracy --------------------------------------------------------------------------------------------


def test_time_to_accuracy(tmp_path: Path) -> None:
    """The same accuracies are asked of all: shares of the best, 0.8, which lossy runs reach half of, and late."""
    lossy = tree()
    lossy["federation"] |= {"participation": {"dropout": {"name": "random", "after": 0.2}}}
    for seed in (1, 2):
        make_run(tmp_path / f"a-{seed}", tree(seed=seed), (0.3, 0.6, 0.8, 0.7), simulated_seconds=900.0)
        make_run(tmp_path / f"b-{seed}", lossy | {"seed": seed}, (0.1, None, 0.4, 0.5), simulated_seconds=3600.0)
    make_run(tmp_path / "untimed", tree("lora"), curve(0.9))
    (table,) = tables(make_report(tmp_path), "time")
    assert headings(table) == [
        "method",
        "participation",
        *(f"{unit} to {share}" for share in ("50%", "80%", "95%") for unit in ("rounds", "hours")),
    ]
    assert texts(table) == [
        ["bias", "uniform (dropout none)", "2", "0.5", "3", "0.75", "3", "0.75"],
        ["bias", "uniform (dropout random)", "3", "3", "-", "-", "-", "-"],
    ]
    assert table.rows[1][4].value is None
    assert "0.8000" in table.note
    assert tables(make_report(tmp_path / "untimed"), "time") == []


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_printed_tables_keep_within_the_terminal(
    tmp_path: Path, width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for cohort in (2, 4, 8, 16):
        for alpha in (0.1, 0.5):
            data = {**DIGITS, "partition": {"name": "dirichlet", "alpha": alpha}}
            config = tree("full", data=data, federation={"cohort": cohort})
            make_run(tmp_path / f"{cohort}-{alpha}", config, curve(cohort / 100 + alpha))
    report = make_report(tmp_path)
    console = Console(width=width, color_system=None, force_terminal=False)
    for table in (report.main, *report.comparisons):
        for piece in rich_tables(table, width):
            console.print(piece)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    for group in report.grouping.groups:
        assert str(group.accuracy) in printed
    assert "1,048,576" in printed


# --- unfinished and damaged runs ---------------------------------------------------------------------------------


def test_unfinished_runs_are_listed_everywhere(runs: Path) -> None:
    report = make_report(runs)
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


def test_a_report_on_runs_that_have_just_begun_warns_of_nothing(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "new").write_state("running", 0)  # the state comes before the config
    report = make_report(tmp_path)
    assert run_rows(report.runs) == [{"run": "new", "state": "running"}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = write_report(tmp_path, report)
    assert all(path.exists() for path in written)
    assert "No run is complete yet." in (tmp_path / "report.html").read_text()


def test_a_directory_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run's directory \(state\.json\)"):
        make_report(tmp_path)


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
def test_a_damaged_run_is_named_and_hides_no_other(runs: Path, name: str, content: str | bytes | None) -> None:
    path = runs / "full" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    report = make_report(runs)
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
def test_a_complete_runs_result_counts_whatever_befell_its_other_files(
    runs: Path, name: str, content: str | bytes | None
) -> None:
    path = runs / "full" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    report = make_report(runs)
    assert {group.label for group in report.grouping.groups} == {"head", "full"}
    (row,) = [row for row in report.unfinished.rows if row[0].text == "full"]
    assert row[1].text == "complete"
    assert str(path) in row[-1].text
    write_report(runs, report)


def test_an_accuracy_that_fewer_seeds_stand_behind_is_marked(tmp_path: Path) -> None:
    for method, seeds in (("head", (1, 2)), ("bias", (1,))):
        for seed in seeds:
            make_run(tmp_path / f"{method}{seed}", tree(seed=seed, method=method), curve(0.5))
    table = make_report(tmp_path).comparisons[0]
    texts = {row[0].text: row[-1].text for row in table.rows}
    assert texts["bias"].endswith("(n=1)")
    assert "n=" not in texts["head"]
    assert "n: seeds, 2 where none is told." in table.note


def test_a_cell_that_never_began_is_listed_with_its_error(runs: Path) -> None:
    RunDirectory(runs / "cell").write_state(FAILED, 0, error="data.clients: 9 is too many")
    (row,) = [row for row in make_report(runs).unfinished.rows if row[0].text == "cell"]
    assert [cell.text for cell in row] == ["cell", "failed", "0", "data.clients: 9 is too many"]


def test_nothing_but_damaged_runs_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, tree(), curve(0.5)).summary_file.unlink()
    with pytest.raises(ConfigError, match=r"a.summary\.json.*1 more damaged"):
        make_report(tmp_path)


def test_a_metrics_file_that_was_cut_short_and_none_at_all_are_no_damage(runs: Path) -> None:
    metrics = runs / "full" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-10])
    (runs / "sweep" / "head" / "metrics.jsonl").unlink()
    report = make_report(runs)
    assert [len(group.curve()) for group in report.grouping.groups] == [0, 1]
    write_report(runs, report)


# --- what is written ---------------------------------------------------------------------------------------------


def test_markdown(runs: Path) -> None:
    lines = markdown_report(make_report(runs)).splitlines()
    assert lines[0] == f"# Runs below {runs.name}"
    assert lines[2].startswith("| method | trained parameters | clients a round |")
    assert lines[3].startswith("| --- | ---: | ---: |")
    assert lines[4] == "| head | 4,096 | 4 | 0.0156 | 0.062 | 0.19 | 0.39% | 0.6250 | 1 |"
    assert "![Accuracy against bytes](accuracy_against_bytes.png)" in lines


def test_csv_has_whole_numbers_and_every_key_that_varies(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", tree(seed=seed, client={"epochs": seed}), curve(1 / 3))
    write_report(tmp_path, make_report(tmp_path))
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
    report = make_report(tmp_path)
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


def test_either_dirichlet_partition_is_told_by_its_name(tmp_path: Path) -> None:
    for name in ("dirichlet", "dirichlet_mix"):
        data = {**DIGITS, "partition": {"name": name, "alpha": 0.5}}
        make_run(tmp_path / name, tree(data=data), curve(0.5))
    (table,) = tables(make_report(tmp_path), "partition")
    assert headings(table) == ["method", "dirichlet (alpha 0.5)", "dirichlet_mix (alpha 0.5)"]


def test_csv_tells_mean_and_spread_apart(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", tree(seed=seed), curve(seed / 4))
    (row,) = csv.DictReader(csv_text(make_report(tmp_path).main).splitlines())
    assert (float(row["final accuracy"]), row["seeds"]) == (0.375, "2")
    assert float(row["std"]) == statistics.stdev((0.25, 0.5))


def test_json_is_one_object(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fedpeft", "report", str(runs), "--json"])
    before = sorted(runs.rglob("*"))
    cli.main()
    found = json.loads(capsys.readouterr().out)
    assert sorted(runs.rglob("*")) == before
    assert found["runs"] == run_rows(make_report(runs).runs)
    assert [group["final_accuracy"] for group in found["groups"]] == [
        {"mean": 0.625, "std": None},
        {"mean": 0.75, "std": None},
    ]
    assert found["groups"][0]["runs"] == ["sweep/head"]
    main, communication = found["tables"]
    assert main["columns"][0] == "method"
    assert main["rows"][0][-2] == {"mean": 0.625, "std": None, "seeds": 1, "group": "head"}
    assert communication["kind"] == "communication"


def test_the_command_prints_tables_and_says_what_it_wrote(
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


def test_the_report_itself_is_no_run(runs: Path) -> None:
    first = write_report(runs, make_report(runs))
    again = make_report(runs)
    assert len(again.runs) == 3
    assert write_report(runs, again) == first


def test_reading_runs_imports_nothing_heavy(runs: Path) -> None:
    probe = (
        "import sys; from pathlib import Path; from fedpeft_dist.reports.report import make_report, json_report; "
        f"json_report(make_report(Path({str(runs)!r}))); "
        "print([name for name in ('torch', 'timm', 'matplotlib', 'torchvision') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout == "[]\n"


# --- pictures ----------------------------------------------------------------------------------------------------


def test_the_plot_is_a_picture(runs: Path) -> None:
    write_report(runs, make_report(runs))
    picture = imread(runs / "accuracy_against_bytes.png")
    assert picture.shape[0] > 300
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10


def test_the_plot_has_a_line_for_each_group_and_unfinished_run(runs: Path) -> None:
    make_run(runs / "full2", tree("full", 2), (0.5, None, 0.25))
    (axes,) = accuracy_figure(make_report(runs).lines).axes
    lines = {line.get_label(): line.get_data() for line in axes.lines}
    assert set(lines) == {"full", "head", "sweep/lora (interrupted)"}
    sent, accuracy = lines["full"]
    assert list(sent) == [4.0 * COHORT, 4.0 * COHORT * 3]  # round 2 was not evaluated, but its bytes count
    assert list(accuracy) == pytest.approx([0.375, 0.5])  # over both seeds


def test_the_plot_begins_a_little_below_the_lowest_accuracy(tmp_path: Path) -> None:
    for seed, method in enumerate(("head", "bias")):
        make_run(tmp_path / method, tree(method), (0.94 + seed / 100, 0.96, 0.98))
    (axes,) = accuracy_figure(make_report(tmp_path).lines).axes
    low, high = axes.get_ylim()
    assert 0.93 < low < 0.94
    assert 0.98 < high < 0.99


def test_a_plot_of_many_lines_has_a_colour_for_each_method(tmp_path: Path) -> None:
    for method in ("head", "bias"):
        for epochs in range(1, 12):
            make_run(tmp_path / f"{method}{epochs}", tree(method, client={"epochs": epochs}), curve(0.5))
    figure = accuracy_figure(make_report(tmp_path).lines)
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["head", "bias"]


def test_a_long_curve_is_thinned_out_and_keeps_its_end(tmp_path: Path) -> None:
    make_run(tmp_path / "long", tree(), curve(0.5, rounds=1001))
    (series,) = map(line_data, make_report(tmp_path).lines)
    assert len(series["round"]) == MAX_POINTS
    assert (series["round"][0], series["round"][-1], series["mean"][-1]) == (1, 1001, 0.5)


def test_a_curve_has_the_rounds_that_all_seeds_evaluated(tmp_path: Path) -> None:
    make_run(tmp_path / "a", tree(seed=1), (0.25, 0.5, 0.75, 0.5))
    make_run(
        tmp_path / "b",
        tree(seed=2, federation={"rounds": 3, "cohort": COHORT, "evaluate_every": 2}),
        (None, 0.25, None, 0.5),
    )
    (series,) = map(line_data, make_report(tmp_path).lines)
    assert series["round"] == [2, 4]
    assert series["mean"] == [0.375, 0.5]
    assert series["std"] == [pytest.approx(statistics.stdev((0.5, 0.25)), abs=1e-6), 0.0]


def test_each_distinct_partition_has_one_picture(tmp_path: Path) -> None:
    for method in ("head", "bias"):
        for seed in (1, 2):
            make_run(tmp_path / f"{method}{seed}", tree(method, seed), curve(0.5), counts=partition_counts(seed))
    make_run(tmp_path / "without", tree("lora"), curve(0.5))
    pictures, left_out = partition_pictures(make_report(tmp_path).runs)
    assert left_out == 0
    assert [(picture["title"], picture["runs"]) for picture in pictures] == [
        ("digits, dirichlet 0.1, N=8, seed 1", 2),
        ("digits, dirichlet 0.1, N=8, seed 2", 2),
    ]
    assert pictures[1]["counts"] == partition_counts(2)
    assert {picture["most"] for picture in pictures} == {np.max([partition_counts(1), partition_counts(2)])}


# --- the page ----------------------------------------------------------------------------------------------------

NASTY = "a</script><b onclick='x'>&amp; \"q\" {{data}} é💡 <!-- |"


class Page(HTMLParser):
    """Counts elements and keeps texts, as a browser would see them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_names_of_runs_are_never_markup(tmp_path: Path) -> None:
    name = NASTY.replace("/", "\N{FRACTION SLASH}")
    make_run(tmp_path / name, tree("lora"), state=INTERRUPTED)
    make_run(tmp_path / "done", tree(backbone={"model_args": {"note": NASTY}}), curve(0.5))
    make_run(tmp_path / "other", tree(), curve(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(tmp_path, make_report(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("script") == 2
    assert "b" not in page.tags
    assert name in page.texts
    data = json.loads(next(text for text in page.texts if text.startswith('{"series"')))
    assert name in {series["label"].removesuffix(" (interrupted)") for series in data["series"]}
    markdown = (tmp_path / "report.md").read_text()
    assert "<b" not in markdown
    assert "&lt;!-- \\|" in markdown


def test_json_in_a_script_cannot_end_it() -> None:
    text = script_json({"name": NASTY})
    assert "<" not in text
    assert json.loads(text) == {"name": NASTY}


def test_the_page_refers_to_nothing_outside_itself(runs: Path) -> None:
    write_report(runs, make_report(runs))
    page = Page((runs / "report.html").read_text())
    assert [value for name, value in page.attributes if name in ("src", "href")] == ["data:,"]
    assert any(value and value.startswith("default-src 'none'") for _, value in page.attributes)


def test_a_page_over_many_runs_stays_small(tmp_path: Path) -> None:
    for number in range(60):
        config = tree(seed=number % 3, client={"epochs": number // 3 + 1})
        make_run(tmp_path / str(number), config, curve(0.5, rounds=50), counts=partition_counts(number % 3, 64, 100))
    write_report(tmp_path, make_report(tmp_path))
    assert (tmp_path / "report.html").stat().st_size < 2**19
