"""The plots, and the curves and partitions of the page."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from fedpeft_dist.reports.page import MAX_POINTS, line_data, partition_pictures
from fedpeft_dist.reports.plot import accuracy_figure
from fedpeft_dist.reports.report import Report, write_report
from tests.report_fixtures import (
    COHORT,
    curve,
    make_run,
    partition_counts,
    tree,
)


def test_the_plot_is_a_picture(runs: Path) -> None:
    write_report(runs, Report(runs))
    picture = imread(runs / "accuracy_against_bytes.png")
    assert picture.shape[0] > 300
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10


def test_the_plot_has_a_line_for_each_group_and_unfinished_run(runs: Path) -> None:
    make_run(runs / "full2", tree("full", 2), (0.5, None, 0.25))
    (axes,) = accuracy_figure(Report(runs).lines).axes
    lines = {line.get_label(): line.get_data() for line in axes.lines}
    assert set(lines) == {"full", "head", "sweep/lora (interrupted)"}
    sent, accuracy = lines["full"]
    assert list(sent) == [4.0 * COHORT, 4.0 * COHORT * 3]  # round 2 was not evaluated, but its bytes count
    assert list(accuracy) == pytest.approx([0.375, 0.5])  # over both seeds


def test_the_plot_begins_a_little_below_the_lowest_accuracy(tmp_path: Path) -> None:
    for seed, method in enumerate(("head", "bias")):
        make_run(tmp_path / method, tree(method), (0.94 + seed / 100, 0.96, 0.98))
    (axes,) = accuracy_figure(Report(tmp_path).lines).axes
    low, high = axes.get_ylim()
    assert 0.93 < low < 0.94
    assert 0.98 < high < 0.99


def test_a_plot_of_many_lines_has_a_colour_for_each_method(tmp_path: Path) -> None:
    for method in ("head", "bias"):
        for epochs in range(1, 12):
            make_run(tmp_path / f"{method}{epochs}", tree(method, client={"epochs": epochs}), curve(0.5))
    figure = accuracy_figure(Report(tmp_path).lines)
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["head", "bias"]


def test_a_long_curve_is_thinned_out_and_keeps_its_last_point(tmp_path: Path) -> None:
    make_run(tmp_path / "long", tree(), curve(0.5, rounds=1001))
    (series,) = map(line_data, Report(tmp_path).lines)
    assert len(series["round"]) == MAX_POINTS
    assert (series["round"][0], series["round"][-1], series["mean"][-1]) == (1, 1001, 0.5)


def test_a_curve_has_the_rounds_that_all_seeds_evaluated(tmp_path: Path) -> None:
    make_run(tmp_path / "a", tree(seed=1), (0.25, 0.5, 0.75, 0.5))
    make_run(
        tmp_path / "b",
        tree(seed=2, federation={"rounds": 3, "cohort": COHORT, "evaluate_every": 2}),
        (None, 0.25, None, 0.5),
    )
    (series,) = map(line_data, Report(tmp_path).lines)
    assert series["round"] == [2, 4]
    assert series["mean"] == [0.375, 0.5]
    assert series["std"] == [pytest.approx(statistics.stdev((0.5, 0.25)), abs=1e-6), 0.0]


def test_each_distinct_partition_has_one_picture(tmp_path: Path) -> None:
    for method in ("head", "bias"):
        for seed in (1, 2):
            make_run(tmp_path / f"{method}{seed}", tree(method, seed), curve(0.5), counts=partition_counts(seed))
    make_run(tmp_path / "without", tree("lora"), curve(0.5))
    pictures, left_out = partition_pictures(Report(tmp_path).runs)
    assert left_out == 0
    assert [(picture["title"], picture["runs"]) for picture in pictures] == [
        ("digits, dirichlet 0.1, N=8, seed 1", 2),
        ("digits, dirichlet 0.1, N=8, seed 2", 2),
    ]
    assert pictures[1]["counts"] == partition_counts(2)
    assert {picture["most"] for picture in pictures} == {np.max([partition_counts(1), partition_counts(2)])}
