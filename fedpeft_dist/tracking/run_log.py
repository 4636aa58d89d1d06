"""What a run tells while it goes and leaves when it is over: progress, metrics, summary. Written by rank 0 alone.

Shapes: P trainable parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.lanes.parameters import ParameterLayout
from fedpeft_dist.lanes.wire import uplink_bytes
from fedpeft_dist.runtime.memory import forget_peak_memory, peak_memory
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.tracking.progress import RoundProgress
from fedpeft_dist.tracking.run_directory import COMPLETE, INTERRUPTED, RUNNING, RunDirectory
from fedpeft_dist.tracking.writer import MetricsWriter

NO_TOTALS = {"rejected": 0, "samples": 0, "seconds": 0.0, "best_accuracy": 0.0}
"""Sums and records over a run's rounds; a checkpoint carries them."""
PARTICIPATION = ("selected", "dropped", "late", "surplus", "partial", "wasted_samples")
"""Further sums, of runs whose clients are not always there; `simulated_seconds` of those whose clients take time."""
_CLIENTS = ("clients_sending", "clients_receiving")
"""Further sums: what uplink and downlink follow from."""


class RunLog:
    """A context manager around a run's rounds; on ranks other than 0 it keeps the totals and is silent.

    Args:
        totals: of the rounds done before, updated in place.
        rounds_done: how many those are.
        num_rounds: how many there will be.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        runtime: Runtime,
        totals: dict[str, float],
        rounds_done: int,
        num_rounds: int,
    ):
        self.config, self.directory, self.runtime, self.totals = config, directory, runtime, totals
        self.rounds_done = rounds_done
        self.is_evaluated = False
        """Whether the last round was, of those run here."""
        for key in _CLIENTS:  # which a checkpoint lacks that was written when all cohorts were full
            totals.setdefault(key, rounds_done * config.federation.cohort)
        self.progress = RoundProgress(config.output.name, num_rounds, rounds_done, runtime.is_main)
        self.writer: MetricsWriter | None = None

    def __enter__(self) -> RunLog:
        forget_peak_memory(self.runtime.device)
        if self.runtime.is_main:
            # The state first: a complete run that is being made longer must not look complete under its new config.
            self.directory.write_state(RUNNING, self.rounds_done)
            self.directory.write_config(self.config)
            self.writer = MetricsWriter(self.directory, self.rounds_done)
        self.progress.__enter__()
        if self.rounds_done:
            self.progress.note(f"{self.directory.path}: going on after round {self.rounds_done}")
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.__exit__(*error)
        if self.writer is not None:
            self.writer.close()

    def write_setting(self, counts: np.ndarray, num_clients: int, class_names: Sequence[str] | None = None) -> None:
        """The config and the partition, for TensorBoard and reports, on rank 0; counts as `class_counts` gives them."""
        self.directory.write_partition(counts.tolist(), num_clients, class_names)
        self.writer.write_setting(self.config, counts, num_clients)

    def round_done(
        self,
        evaluation: Mapping[str, float],
        train_loss: float | None,
        num_rejected: int,
        num_samples: int,
        num_parameters: int,
        cohort: int,
        selected: int,
        participation: Mapping[str, float],
        spending: Mapping[str, float | None],
        seconds: float,
        evaluate_seconds: float,
    ) -> None:
        """Adds a round to the totals and shows it.

        Args:
            evaluation: empty for a round that was not evaluated.
            cohort: clients that sent an update.
            selected: clients that received the parameters.
            participation: how clients fared, as numbers to add up; empty where nothing can happen to them.
            spending: the epsilon of all rounds so far, and this round's clipping norm where it moves; empty without
                privacy that is accounted for.
        """
        self.rounds_done += 1
        for key, value in (*zip(_CLIENTS, (cohort, selected)), *participation.items()):
            self.totals[key] = self.totals.get(key, 0) + value
        self.totals["rejected"] += num_rejected
        self.totals["samples"] += num_samples
        self.totals["seconds"] += seconds
        self.is_evaluated = bool(evaluation)
        if evaluation:
            self.evaluated(evaluation)
        if self.writer is None:
            return
        row = {
            "round": self.rounds_done,
            "accuracy": None,
            **evaluation,
            "train_loss": train_loss,
            "cohort": cohort,
            "rejected": num_rejected,
            **participation,
            **spending,
            "uplink_bytes": uplink_bytes(num_parameters, cohort),
            "downlink_bytes": uplink_bytes(num_parameters, selected),
            "seconds": seconds,
            "evaluate_seconds": evaluate_seconds,
            "samples": num_samples,
            "samples_per_second": num_samples / seconds,
            "peak_memory_bytes": peak_memory(self.runtime.device),
        }
        self.writer.write_round(row)
        self.progress.round_done(row)

    def evaluated(self, evaluation: Mapping[str, float]) -> None:
        """Adds the accuracy of the rounds so far to the totals."""
        self.totals["final_accuracy"] = evaluation["accuracy"]
        self.totals["best_accuracy"] = max(self.totals["best_accuracy"], evaluation["accuracy"])

    def flush(self) -> None:
        """What a checkpoint is about to count must be on disk, too."""
        if self.writer is not None:
            self.writer.flush()

    def interrupted(self) -> None:
        """The run stopped at a round boundary; this launch's name lets a restarted worker leave it stopped."""
        if self.runtime.is_main:
            self.directory.write_state(INTERRUPTED, self.rounds_done, self.runtime.launch.job)

    def complete(
        self,
        vector: torch.Tensor,
        layout: ParameterLayout,
        backbone_parameters: int,
        origin: Mapping[str, str],
        privacy: Mapping[str, Any] | None,
    ) -> None:
        """The run is over: its parameters by name, its summary, its state.

        Args:
            vector: the global vector, float32 [P].
            origin: what belongs to the parameters: the digest of the backbone, and how images are prepared.
            privacy: what the run has spent, on what guarantee; None where it was not private.
        """
        if not self.runtime.is_main:
            return
        config, totals = self.config, self.totals
        digest = hashlib.sha256(vector_bytes(vector)).hexdigest()
        metadata = {
            "method": config.method.name,
            "backbone": config.backbone.name,
            **origin,
            "weights_sha256": digest,
        }
        self.directory.write_trainable(layout.split(vector), metadata)
        sent, received = (uplink_bytes(len(vector), int(totals[key])) for key in _CLIENTS)
        summary = {
            "method": config.method.name,
            "trainable_parameters": len(vector),
            "backbone_parameters": backbone_parameters,
            "rounds": self.rounds_done,
            "final_accuracy": totals["final_accuracy"],
            "best_accuracy": totals["best_accuracy"],
            "uplink_bytes_total": sent,
            "downlink_bytes_total": received,
            "rejected_total": int(totals["rejected"]),
            "participation": {key: int(totals[key]) for key in PARTICIPATION if key in totals} or None,
            "simulated_hours": totals["simulated_seconds"] / 3600 if "simulated_seconds" in totals else None,
            "samples_per_second": totals["samples"] / totals["seconds"],
            "lanes": config.runtime.lanes,
            "world_size": self.runtime.world_size,
            "weights_sha256": digest,
            "privacy": privacy,
        }
        self.directory.write_summary(summary)
        is_short = self.rounds_done < config.federation.rounds
        budget = {"stopped_at_epsilon": config.privacy.stop_at_epsilon} if is_short else {}
        self.directory.write_state(COMPLETE, self.rounds_done, **budget)


def vector_bytes(vector: torch.Tensor) -> bytes:
    """A float32 vector as little-endian bytes, whatever the machine's own order."""
    return vector.cpu().numpy().astype("<f4").tobytes()
