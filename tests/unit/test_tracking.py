"""Reports over runs, pictures of partitions, and what a run prints where there is no terminal."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.tracking import report
from fedpeft_dist.tracking.cost import MIB, uplink_bytes
from fedpeft_dist.tracking.partition_view import partition_figure, partition_table
from fedpeft_dist.tracking.progress import RoundProgress
from fedpeft_dist.tracking.run_directory import COMPLETE, INTERRUPTED, RunDirectory

COHORT, ROUNDS = 4, 3


def make_run(path: Path, parameters: int, state: str = COMPLETE, accuracy: float = 0.5) -> None:
    """A run's directory as the round loop leaves it, with the keys that a report reads."""
    directory = RunDirectory(path)
    path.mkdir(parents=True)
    sent = uplink_bytes(parameters, COHORT)
    for number in range(1, ROUNDS + 1):
        value = None if number == 2 else accuracy * number / ROUNDS
        directory.append_metrics({"round": number, "accuracy": value, "uplink_bytes": sent})
    directory.write_state(state, ROUNDS)
    if state == COMPLETE:
        directory.write_summary(
            {
                "method": path.name,
                "trainable_parameters": parameters,
                "backbone_parameters": 2**20,
                "uplink_bytes_total": sent * ROUNDS,
                "final_accuracy": accuracy,
            }
        )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_run(tmp_path / "full", 2**20, accuracy=0.75)
    make_run(tmp_path / "sweep" / "head", 2**12, accuracy=0.625)
    make_run(tmp_path / "sweep" / "lora", 2**16, state=INTERRUPTED)
    return tmp_path


def test_rows_come_with_the_fewest_bytes_first_and_unfinished_runs_last(runs: Path) -> None:
    rows = report.table_rows(report.read_runs(runs))
    assert rows == [
        {
            "run": "sweep/head",
            "state": "complete",
            "method": "head",
            "trained_parameters": 4096,
            "mib_per_client": 4096 * 4 / MIB,
            "mib_total": 4096 * 4 * COHORT * ROUNDS / MIB,
            "share_of_full": 1 / 256,
            "final_accuracy": 0.625,
        },
        {
            "run": "full",
            "state": "complete",
            "method": "full",
            "trained_parameters": 2**20,
            "mib_per_client": 4.0,
            "mib_total": 48.0,
            "share_of_full": 1.0,
            "final_accuracy": 0.75,
        },
        {"run": "sweep/lora", "state": "interrupted"},
    ]
    assert json.loads(json.dumps(rows)) == rows


def test_a_run_can_be_reported_on_alone(runs: Path) -> None:
    (run,) = report.read_runs(runs / "full")
    assert (run.name, run.state, len(run.metrics)) == ("full", COMPLETE, ROUNDS)
    assert run.metrics[1]["accuracy"] is None


def test_the_markdown_table(runs: Path) -> None:
    lines = report.markdown_table(report.table_rows(report.read_runs(runs))).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(lines) == 5
    assert {len(row) for row in cells} == {len(report.COLUMNS)}
    assert cells[0][0] == "run"
    assert cells[1] == ["---", "---", *["---:"] * (len(report.COLUMNS) - 2)]
    assert cells[2] == ["sweep/head", "head", "4,096", "0.0156", "0.19", "0.39%", "0.6250"]
    assert cells[3] == ["full", "full", "1,048,576", "4.0000", "48.00", "100.00%", "0.7500"]
    assert cells[4] == ["sweep/lora", "interrupted", "", "", "", "", ""]


def test_the_printed_table_has_the_same_cells(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = report.rich_table(report.table_rows(report.read_runs(runs)))
    assert table.row_count == 3
    Console(width=200).print(table)
    printed = capsys.readouterr().out
    for cell in ("sweep/head", "4,096", "0.6250", "100.00%", "interrupted"):
        assert cell in printed


def test_the_report_is_written_with_its_plot(runs: Path) -> None:
    found = report.read_runs(runs)
    table = report.markdown_table(report.table_rows(found))
    text, plot = report.write_report(runs, found, table)
    assert table in text.read_text()
    assert plot.name in text.read_text()
    picture = imread(plot)
    assert picture.shape[0] > 300
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10


def test_the_plot_has_a_line_a_run_of_accuracy_over_bytes_sent(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    lines = {}
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, label, **_: lines.update({label: (list(x), list(y))}))
    monkeypatch.setattr(Axes, "legend", lambda self: None)
    report.write_report(runs, report.read_runs(runs), "")
    assert set(lines) == {"full", "sweep/head", "sweep/lora"}
    sent, accuracy = lines["full"]
    assert sent == [4.0 * COHORT, 4.0 * COHORT * 3]  # round 2 was not evaluated, but its bytes count
    assert accuracy == pytest.approx([0.25, 0.75])


def test_a_report_on_runs_that_have_just_begun_warns_of_nothing(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "new").write_state("running", 0)
    runs = report.read_runs(tmp_path)
    assert report.table_rows(runs) == [{"run": "new", "state": "running"}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, plot = report.write_report(tmp_path, runs, report.markdown_table(report.table_rows(runs)))
    assert plot.exists()


def test_a_directory_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run's directory \(state\.json\)"):
        report.read_runs(tmp_path)


def test_a_complete_run_without_its_summary_is_named(runs: Path) -> None:
    (runs / "full" / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"full.summary\.json"):
        report.read_runs(runs)


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
