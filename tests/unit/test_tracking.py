"""Pictures of partitions, what a run leaves about its own, and what it prints where there is no terminal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.runtime import process
from fedpeft_dist.tracking.partition_view import partition_figure, partition_table
from fedpeft_dist.tracking.progress import RoundProgress
from fedpeft_dist.tracking.run_directory import RunDirectory
from fedpeft_dist.tracking.run_log import RunLog


def test_the_partition_table_has_a_line_a_client(capsys: pytest.CaptureFixture[str]) -> None:
    counts = np.array([[1200, 0, 0], [1, 600, 0], [0, 0, 0]])
    table = partition_table(counts, 5000)
    assert table.row_count == 3
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["0", "1", "2"]
    assert columns[1] == ["1,200", "601", "0"]
    assert columns[2] == ["1", "2", "0"]
    strips = columns[3]
    assert strips[0] == "@  "
    assert strips[1][0] not in " @"  # a single sample is still visible
    assert strips[1][1] not in " @"
    assert strips[2] == "   "
    Console(width=120).print(table)
    assert "3 of 5,000 clients" in capsys.readouterr().out


def test_a_partition_of_nothing_can_be_shown() -> None:
    assert partition_table(np.zeros((2, 3), dtype=np.int64), 2).row_count == 2


def test_the_partition_figure_shows_the_counts(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 50, size=(8, 10))
    figure = partition_figure(counts, 1_000_000)
    axes = figure.axes[0]
    assert np.array_equal(axes.images[0].get_array(), counts)
    assert "8 of 1,000,000 clients" in axes.get_title()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("class", "client")
    figure.savefig(tmp_path / "partition.png", dpi=60)
    assert imread(tmp_path / "partition.png").ndim == 3


def test_a_run_leaves_its_partition_for_reports(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 50, size=(100, 100))
    config = parse_config({"output": {"name": "run"}, "runtime": {"device": "cpu"}}, "test")
    directory = RunDirectory(tmp_path / "run")
    with process.start(config.runtime) as runtime:
        with RunLog(config, directory, runtime, 0, config.federation.rounds) as log:
            log.write_setting(counts, 1_000_000, [f"class {number}" for number in range(100)])
    found = json.loads(directory.partition_file.read_text())
    assert found["counts"] == counts.tolist()
    assert (found["num_clients"], found["class_names"][99]) == (1_000_000, "class 99")
    assert directory.partition_file.stat().st_size < 2**16
    assert not list(directory.path.glob(".partition*"))


def row(number: int, accuracy: float | None = 0.5, loss: float | None = 0.25) -> dict[str, float | None]:
    return {
        "round": number,
        "accuracy": accuracy,
        "train_loss": loss,
        "samples_per_second": 1234.4,
        "seconds": 2.0,
        "evaluate_seconds": 1.0,
    }


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_terminal")
def test_progress_is_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with RoundProgress("my-run", 10, 2, visible=True) as progress:
        progress.note("[bold] a note")
        progress.round_done(row(3))
        progress.round_done(row(4, accuracy=None))
    assert capsys.readouterr().out.splitlines() == [
        "[bold] a note",
        "my-run: round 3/10  accuracy 0.5000  loss 0.2500  1,234 samples/s  21 s left",
        "my-run: round 4/10  loss 0.2500  1,234 samples/s  18 s left",
    ]


@pytest.mark.usefixtures("no_terminal")
def test_a_round_without_any_accepted_client_is_shown_too(capsys: pytest.CaptureFixture[str]) -> None:
    with RoundProgress("my-run", 10, 0, visible=True) as progress:
        progress.round_done(row(1, loss=None))
    assert capsys.readouterr().out.startswith("my-run: round 1/10  accuracy 0.5000  ")


def test_only_one_rank_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with RoundProgress("my-run", 10, 0, visible=False) as progress:
        progress.note("a note")
        progress.round_done(row(1))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
