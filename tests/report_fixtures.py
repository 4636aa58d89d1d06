"""Directories of runs for tests of reports. The real writers write them; nothing is trained."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.lanes.wire import BYTES_PER_PARAMETER
from fedpeft_dist.reports.report import Report
from fedpeft_dist.reports.tables import Table
from fedpeft_dist.tracking.run_directory import COMPLETE, RunDirectory

MIB, COHORT = 2**20, 4
DIGITS = {"name": "digits", "clients": 16}
FULL = 2**20
"""Parameters of the imagined backbone."""
PARAMETERS = {"head": 2**12, "bias": 2**13, "prompt": 2**13, "adapter": 2**14, "lora": 2**16, "full": FULL}


def make_run(
    path: Path,
    tree: Mapping[str, Any],
    accuracies: Sequence[float | None] = (0.25, None, 0.5),
    state: str = COMPLETE,
    parameters: int | None = None,
    privacy: Mapping[str, Any] | None = None,
    counts: Sequence[Sequence[int]] | None = None,
    simulated_seconds: float | None = None,
) -> RunDirectory:
    """Writes a run with a round for each accuracy; the tree is its config over the defaults.

    Args:
        simulated_seconds: of each round, where clients take simulated time.
    """
    config = parse_config(tree, str(path))
    parameters = parameters or PARAMETERS[config.method.name]
    directory = RunDirectory(path)
    path.mkdir(parents=True)
    directory.write_config(config)
    sent = BYTES_PER_PARAMETER * parameters * config.federation.cohort
    for number, accuracy in enumerate(accuracies, 1):
        timed = {} if simulated_seconds is None else {"simulated_seconds": simulated_seconds}
        directory.append_metrics({"round": number, "accuracy": accuracy, "uplink_bytes": sent, **timed})
    if counts is not None:
        directory.write_partition(counts, len(counts))
    directory.write_state(state, len(accuracies))
    if state == COMPLETE:
        directory.write_summary(
            {
                "method": config.method.name,
                "trainable_parameters": parameters,
                "backbone_parameters": FULL,
                "rounds": len(accuracies),
                "final_accuracy": accuracies[-1],
                "best_accuracy": max(accuracy for accuracy in accuracies if accuracy is not None),
                "uplink_bytes_total": sent * len(accuracies),
                "downlink_bytes_total": sent * len(accuracies),
                "simulated_hours": None if simulated_seconds is None else simulated_seconds * len(accuracies) / 3600,
                "samples_per_second": 100.0,
                "weights_sha256": hashlib.sha256(path.name.encode()).hexdigest(),
                "privacy": privacy,
            }
        )
    return directory


def private(name: str, epsilon: float) -> dict[str, Any]:
    """A summary's `privacy`; an accountant stays a little below its target."""
    spent = 0.999 * epsilon
    largest = {"epsilon": spent, "noise_multiplier": 4 / epsilon, "steps": 40}
    accounted: dict[str, Any] = {**largest, "dp_delta": 1e-3, "clip_norm": 1.0}
    if name == "sample":
        accounted["clients"] = {"min": {"epsilon": 0.0, "noise_multiplier": 1 / epsilon, "steps": 0}, "max": largest}
    noise = {"epsilon": None, "dp_delta": None, "noise_std": 3.378, "clip_norm": None}
    return {
        "name": name,
        **(noise if name == "paper_noise" else accounted),
        "guarantee": {"sample": "any one training sample", "user": "any one client", "paper_noise": "none"}[name],
        "outside": ["train_loss", "rejected", "accuracy"],
    }


def curve(final: float, rounds: int = 4) -> list[float]:
    """Accuracies that climb evenly to the last."""
    return [final * number / rounds for number in range(1, rounds + 1)]


def partition_counts(seed: int, clients: int = 8, classes: int = 10) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, 50, size=(clients, classes)).tolist()


def make_privacy_sweep(folder: Path) -> None:
    """Head and full on digits: public, sample at two epsilons, paper_noise, and user-level for the head; two seeds."""
    for method, public in (("head", 0.8), ("full", 0.9)):
        cells = {
            "none": (None, public),
            "sample2": (("sample", 2.0), 0.5 * public),
            "sample5": (("sample", 5.0), public**3),
        }
        cells["noise"] = (("paper_noise", 5.0), 0.1)
        if method == "head":
            cells["user"] = (("user", 20.0), 0.4)
        for cell, (mechanism, accuracy) in cells.items():
            for seed in (1, 2):
                tree: dict[str, Any] = {
                    "seed": seed,
                    "method": {"name": method},
                    "data": {"name": "digits", "clients": 16},
                    "federation": {"rounds": 4, "cohort": 4},
                    "client": {"optimizer": {"lr": 0.1 if mechanism is None else 0.01}},
                }
                if mechanism is not None:
                    tree["privacy"] = {"name": mechanism[0], "epsilon": mechanism[1]}
                if cell == "user":
                    tree["federation"]["participation"] = {"name": "poisson"}
                said = None if mechanism is None else private(*mechanism)
                make_run(folder / f"{method}-{cell}-{seed}", tree, curve(accuracy + seed / 100), privacy=said)


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
