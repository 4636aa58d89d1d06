"""Runs' directories as the round loop leaves them, for tests of reports: by the real writers, trained by nobody."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft_dist.config.load import parse_config
from fedpeft_dist.tracking.cost import uplink_bytes
from fedpeft_dist.tracking.run_directory import COMPLETE, RunDirectory

FULL = 2**20
"""Parameters of the imagined backbone."""
PARAMETERS = {"head": 2**12, "bias": 2**13, "prompt": 2**13, "adapter": 2**14, "lora": 2**16, "full": FULL}


def make_run(
    path: Path,
    tree: Mapping[str, Any],
    accuracies: Sequence[float | None] = (0.25, None, 0.5),
    state: str = COMPLETE,
    parameters: int | None = None,
    privacy: Mapping[str, float | None] | None = None,
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
    sent = uplink_bytes(parameters, config.federation.cohort)
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


def curve(final: float, rounds: int = 4) -> list[float]:
    """Accuracies that climb evenly to the last."""
    return [final * number / rounds for number in range(1, rounds + 1)]


def partition_counts(seed: int, clients: int = 8, classes: int = 10) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, 50, size=(clients, classes)).tolist()
