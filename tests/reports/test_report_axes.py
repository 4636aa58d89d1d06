"""Axes and labels: from a sweep, and from the configs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.reports import runs as report_runs
from fedpeft_dist.reports.axes import short_names
from fedpeft_dist.reports.comparisons import comparison_tables
from fedpeft_dist.reports.groups import group_runs
from fedpeft_dist.reports.report import Report
from fedpeft_dist.tracking.sweep_axes import AxisChoice, write_axes
from tests.report_fixtures import (
    COHORT,
    DIGITS,
    curve,
    headings,
    make_run,
    tables,
    texts,
    tree,
)


def test_a_report_on_a_sweep_uses_its_axes_and_choices(sweep: Path) -> None:
    report = Report(sweep)
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


def test_one_run_outside_the_sweep_makes_the_configs_give_all_axes(sweep: Path) -> None:
    make_run(sweep / "further", tree("full"), curve(0.5))
    report = Report(sweep)
    assert headings(report.main)[:4] == ["method", "clients", "partition", "lr"]
    assert "head, N=16, M=2, iid" in {group.label for group in report.grouping.groups}


def test_choices_that_do_not_tell_groups_apart_are_ignored(sweep: Path) -> None:
    for path in sweep.iterdir():
        write_axes(path, {"method": AxisChoice("one", ("method.name",))})
    assert len({group.label for group in Report(sweep).grouping.groups}) == 8


def test_a_damaged_sweep_file_is_named_and_changes_no_result(sweep: Path) -> None:
    (sweep / "small-even-2" / "sweep.json").write_text("{")
    report = Report(sweep)
    assert len(report.grouping.groups) == 8
    ((name, state, _, problem),) = texts(report.unfinished)
    assert (name, state) == ("small-even-2", "complete")
    assert "sweep.json" in problem


def test_both_dirichlet_partitions_have_different_labels(tmp_path: Path) -> None:
    for name in ("dirichlet", "dirichlet_mix"):
        data = {**DIGITS, "partition": {"name": name, "alpha": 0.5}}
        make_run(tmp_path / name, tree(data=data), curve(0.5))
    (table,) = tables(Report(tmp_path), "partition")
    assert headings(table) == ["method", "dirichlet (alpha 0.5)", "dirichlet_mix (alpha 0.5)"]


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
    assert {group.label for group in Report(tmp_path).grouping.groups} == {
        "adapter (bottleneck 96)",
        "adapter (bottleneck 8)",
        "prompt (depth deep)",
        "prompt (depth shallow)",
        "full (pretrained true)",
        "full (pretrained false)",
    }


def test_a_backbones_label_names_its_checkpoint(tmp_path: Path) -> None:
    for number, path in enumerate((None, "/a/b/mae.pth", "/a/c/mae.pth", "/a/moco.npz")):
        make_run(tmp_path / str(number), tree(backbone={"name": "vit", "checkpoint": path}), curve(0.5))
    labels = {group.axes["backbone"] for group in Report(tmp_path).grouping.groups}
    assert labels == {"vit", *(f"vit (checkpoint /a/{file})" for file in ("b/mae.pth", "c/mae.pth", "moco.npz"))}


def test_every_group_has_its_own_label(tmp_path: Path) -> None:
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
    report = Report(tmp_path)
    assert len({group.label for group in report.grouping.groups}) == len(trees)
    for table in report.comparisons:
        for row in table.rows:
            cells = [cell.value["group"] for cell in row if isinstance(cell.value, dict)]
            assert len(cells) == len(set(cells))


def test_no_cell_of_random_mixtures_holds_two_groups() -> None:
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
def test_short_names_stay_different(keys: list[str], expected: list[str]) -> None:
    assert list(short_names(keys).values()) == expected
