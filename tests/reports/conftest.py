"""Directories of runs that several tests of reports read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft_dist.tracking.run_directory import INTERRUPTED
from fedpeft_dist.tracking.sweep_axes import AxisChoice, write_axes
from tests.report_fixtures import (
    DIGITS,
    curve,
    make_privacy_sweep,
    make_run,
    tree,
)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_run(tmp_path / "full", tree("full"), (0.25, None, 0.75))
    make_run(tmp_path / "sweep" / "head", tree("head"), (0.25, None, 0.625))
    make_run(tmp_path / "sweep" / "lora", tree("lora"), state=INTERRUPTED)
    return tmp_path


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


@pytest.fixture
def privacy_sweep(tmp_path: Path) -> Path:
    make_privacy_sweep(tmp_path)
    return tmp_path
