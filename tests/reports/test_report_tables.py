"""The tables that compare groups, and their width on a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from fedpeft_dist.reports.report import Report
from fedpeft_dist.reports.tables import rich_tables
from tests.report_fixtures import (
    DIGITS,
    MIB,
    PARAMETERS,
    curve,
    headings,
    make_run,
    tables,
    texts,
    tree,
)


def test_the_main_table(runs: Path) -> None:
    table = Report(runs).main
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


def test_the_main_table_shows_exactly_the_keys_that_vary(tmp_path: Path) -> None:
    for method, lr in (("head", 0.1), ("bias", 0.2)):
        for alpha in (0.1, 0.5):
            data = {**DIGITS, "partition": {"name": "dirichlet", "alpha": alpha}}
            make_run(
                tmp_path / f"{method}{alpha}", tree(method, data=data, client={"optimizer": {"lr": lr}}), curve(0.5)
            )
    table = Report(tmp_path).main
    assert headings(table)[:4] == ["method", "partition", "lr", "trained parameters"]
    assert [row[:3] for row in texts(table)] == [
        ["head", "dirichlet (alpha 0.1)", "0.1"],
        ["head", "dirichlet (alpha 0.5)", "0.1"],
        ["bias", "dirichlet (alpha 0.1)", "0.2"],
        ["bias", "dirichlet (alpha 0.5)", "0.2"],
    ]
    assert table.note == "Varies along with these: client.optimizer.lr."


def test_the_communication_table_equals_the_papers(tmp_path: Path) -> None:
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
    (table,) = tables(Report(tmp_path), "communication")
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
    report = Report(tmp_path)
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
    (table,) = tables(Report(tmp_path), "data.max_train")
    assert (table.title, headings(table)) == ("Data scale", ["method", "1000", "5000", "all"])
    assert texts(table) == [["bias", "0.2500", "0.3750", "0.5000"]]


def test_backbones_have_a_table(tmp_path: Path) -> None:
    for name, accuracy in (("vit_base_patch16_224.mae", 0.75), ("vit_base_patch16_224.augreg_in21k", 0.5)):
        make_run(tmp_path / name, tree(backbone={"name": name}, data={"name": "cifar100"}), curve(accuracy))
    (table,) = tables(Report(tmp_path), "backbone")
    assert texts(table) == [["bias", "0.5000", "0.7500"]]


def test_a_rows_label_gives_the_values_on_all_other_axes(tmp_path: Path) -> None:
    for partition in ("dirichlet", "iid"):
        for lr, accuracy in ((0.1, 0.25), (0.2, 0.75)):
            data = {**DIGITS, "partition": {"name": partition}}
            config = tree(data=data, client={"optimizer": {"lr": lr}})
            make_run(tmp_path / f"{partition}{lr}", config, curve(accuracy))
    report = Report(tmp_path)
    (table,) = tables(report, "partition")
    assert texts(table) == [["bias, lr 0.1", "0.2500", "0.2500"], ["bias, lr 0.2", "0.7500", "0.7500"]]
    (by_rate,) = tables(report, "client.optimizer.lr")
    assert (by_rate.title, headings(by_rate)) == ("By lr", ["method", "0.1", "0.2"])
    assert [row[0] for row in texts(by_rate)] == ["bias, dirichlet (alpha 0.1)", "bias, iid"]


def test_nothing_to_compare_makes_no_tables(tmp_path: Path) -> None:
    make_run(tmp_path / "one", tree(), curve(0.5))
    assert Report(tmp_path).comparisons == []


def test_accuracies_over_fewer_seeds_are_marked(tmp_path: Path) -> None:
    for method, seeds in (("head", (1, 2)), ("bias", (1,))):
        for seed in seeds:
            make_run(tmp_path / f"{method}{seed}", tree(seed=seed, method=method), curve(0.5))
    table = Report(tmp_path).comparisons[0]
    texts = {row[0].text: row[-1].text for row in table.rows}
    assert texts["bias"].endswith("(n=1)")
    assert "n=" not in texts["head"]
    assert "n: seeds, 2 where none is told." in table.note


def test_time_to_accuracy(tmp_path: Path) -> None:
    """All runs have the same targets, shares of 0.8. The lossy runs reach only the first, and late."""
    lossy = tree()
    lossy["federation"] |= {"participation": {"dropout": {"name": "random", "after": 0.2}}}
    for seed in (1, 2):
        make_run(tmp_path / f"a-{seed}", tree(seed=seed), (0.3, 0.6, 0.8, 0.7), simulated_seconds=900.0)
        make_run(tmp_path / f"b-{seed}", lossy | {"seed": seed}, (0.1, None, 0.4, 0.5), simulated_seconds=3600.0)
    make_run(tmp_path / "untimed", tree("lora"), curve(0.9))
    (table,) = tables(Report(tmp_path), "time")
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
    assert tables(Report(tmp_path / "untimed"), "time") == []


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_printed_tables_fit_the_terminal(tmp_path: Path, width: int, capsys: pytest.CaptureFixture[str]) -> None:
    for cohort in (2, 4, 8, 16):
        for alpha in (0.1, 0.5):
            data = {**DIGITS, "partition": {"name": "dirichlet", "alpha": alpha}}
            config = tree("full", data=data, federation={"cohort": cohort})
            make_run(tmp_path / f"{cohort}-{alpha}", config, curve(cohort / 100 + alpha))
    report = Report(tmp_path)
    console = Console(width=width, color_system=None, force_terminal=False)
    for table in (report.main, *report.comparisons):
        for piece in rich_tables(table, width):
            console.print(piece)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    for group in report.grouping.groups:
        assert str(group.accuracy) in printed
    assert "1,048,576" in printed


def test_both_vectors_of_scaffold_are_counted(tmp_path: Path) -> None:
    sgd = {"optimizer": {"name": "sgd", "momentum": 0.0, "nesterov": False}}
    for name in ("fedavg", "scaffold"):
        sections = {"method": {"name": "bias"}, "data": DIGITS, "federation": {"cohort": 4}, "client": sgd}
        make_run(tmp_path / name, {**sections, "algorithm": {"name": name}})
    table = Report(tmp_path).main
    place = headings(table).index("MiB per client and round")
    assert [row[place] for row in texts(table)] == ["0.0312", "0.0625"]
