"""A worker whose GPU an error has taken: a stand-in for CUDA that fails from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation import run as rounds
from fedpeft_dist.runtime.interrupts import StopRequest
from fedpeft_dist.sweeps.expansion import load_sweep
from fedpeft_dist.sweeps.workers import cell_rows, work_through
from fedpeft_dist.tracking.run_directory import FAILED

BASE = {"data": {"name": "digits", "clients": 4}, "federation": {"rounds": 2, "cohort": 2}}


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_lost_gpu_fails_no_other_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_lost: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = tmp_path / "sweep.yaml"
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    sweep.write_text(yaml.safe_dump({"base": "base.yaml", "cells": {"a": {}, "b": {}}, "output": "out"}))

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    def run_and_fail(config: RunConfig, stop: StopRequest) -> str:
        if is_lost:
            monkeypatch.setattr(torch.cuda, "synchronize", fail)
        return fail()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(rounds, "run", run_and_fail)
    cells = load_sweep(sweep, ())
    outcome = work_through(cells)
    assert outcome.failed == (["a-seed1"] if is_lost else ["a-seed1", "b-seed1"])
    assert [row["state"] for row in cell_rows(cells)] == [FAILED, "waiting" if is_lost else FAILED]
    assert ("cannot use its GPU any more" in capsys.readouterr().err) == is_lost
