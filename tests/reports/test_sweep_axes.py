"""sweep.json: what a sweep's cells leave for reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.federation import run as rounds
from fedpeft_dist.runtime.interrupts import StopRequest
from fedpeft_dist.sweeps.expansion import Cell, load_sweep
from fedpeft_dist.sweeps.workers import work_through
from fedpeft_dist.tracking.run_directory import COMPLETE, INTERRUPTED
from fedpeft_dist.tracking.sweep_axes import AxisChoice, read_axes, write_axes


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Two cells on two axes, and a further cell on none."""
    monkeypatch.chdir(tmp_path)
    base = {"data": {"name": "digits", "clients": 4}, "federation": {"rounds": 2, "cohort": 2}}
    head = {"extends": "base.yaml", "method": {"name": "head"}, "client": {"optimizer": {"lr": 0.5}}}
    sweep = {
        "base": "base.yaml",
        "output": "runs",
        "axes": {"method": {"small": {"extends": "head.yaml"}}, "federation.cohort": [1, 2]},
        "cells": {"further": {}},
    }
    for name, tree in (("base", base), ("head", head), ("sweep", sweep)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_sweep(tmp_path / "sweep.yaml")


def test_a_cell_knows_its_choices_and_the_keys_that_they_set(cells: list[Cell]) -> None:
    assert cells[1].axes == {
        "method": AxisChoice("small", ("method.name", "client.optimizer.lr")),
        "federation.cohort": AxisChoice("cohort2", ("federation.cohort",)),
    }
    assert cells[2].axes == {}


def test_a_complete_cell_leaves_its_axes_in_its_directory(cells: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: object, stop: StopRequest) -> str:
        return INTERRUPTED if config is cells[-1].config else COMPLETE

    monkeypatch.setattr(rounds, "run", run)
    for cell in cells:
        cell.directory.path.mkdir(parents=True)
    work_through(cells)
    assert [read_axes(cell.directory.path) for cell in cells] == [cell.axes for cell in cells]
    assert not (cells[-1].directory.path / "sweep.json").exists()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    write_axes(tmp_path, {"method": AxisChoice("bias", ("method.name",))})
    assert read_axes(tmp_path)["method"].name == "bias"
    for content in ("{", '{"axes": 3}', '{"axes": {"method": {"name": "bias"}}}'):
        (tmp_path / "sweep.json").write_text(content)
        with pytest.raises(ConfigError, match=r"sweep\.json"):
            read_axes(tmp_path)
