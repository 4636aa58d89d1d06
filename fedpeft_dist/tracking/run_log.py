"""What a run tells while it goes: progress on the terminal, metrics.jsonl and TensorBoard. Written by rank 0 alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.runtime.memory import forget_peak_memory, peak_memory
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.tracking.progress import RoundProgress
from fedpeft_dist.tracking.run_directory import RUNNING, RunDirectory
from fedpeft_dist.tracking.writer import MetricsWriter

NO_TOTALS: Mapping[str, float] = {
    "rejected": 0,
    "samples": 0,
    "seconds": 0.0,
    "best_accuracy": 0.0,
    "uplink_bytes": 0,
    "downlink_bytes": 0,
}
"""Sums and records over a run's rounds, before the first."""


@dataclass(frozen=True)
class RoundRecord:
    """What a round brought."""

    round: int
    """The round, counted from 1."""
    train_loss: float | None
    cohort: int
    """Clients that sent an update."""
    rejected: int
    samples: int
    """Training samples processed, repetitions counted."""
    uplink_bytes: int
    downlink_bytes: int
    seconds: float
    """Seconds of the round without its evaluation."""
    evaluate_seconds: float
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """Empty for a round that was not evaluated."""
    participation: Mapping[str, float] = field(default_factory=dict)
    """How clients fared, as numbers to add up. Empty if nothing can happen to them."""
    spending: Mapping[str, float | None] = field(default_factory=dict)
    """The epsilon of all rounds so far, and this round's clipping norm if it moves. Empty without accounting."""
    padding: Mapping[str, int] = field(default_factory=dict)
    """Passes of all ranks, and how many of them were empty, to keep ranks in step; batches that the evaluation computed
    for nothing. Empty without sharding."""

    def row(self) -> dict[str, Any]:
        """The round's line in metrics.jsonl, without the memory that it took."""
        return {
            "round": self.round,
            "accuracy": None,
            **self.evaluation,
            "train_loss": self.train_loss,
            "cohort": self.cohort,
            "rejected": self.rejected,
            **self.participation,
            **self.spending,
            **self.padding,
            "uplink_bytes": self.uplink_bytes,
            "downlink_bytes": self.downlink_bytes,
            "seconds": self.seconds,
            "evaluate_seconds": self.evaluate_seconds,
            "samples": self.samples,
            "samples_per_second": self.samples / self.seconds,
        }


def add_round(totals: Mapping[str, float], record: RoundRecord) -> dict[str, float]:
    """The totals with one more round."""
    added = {key: getattr(record, key) for key in ("rejected", "samples", "seconds", "uplink_bytes", "downlink_bytes")}
    added |= record.participation
    sums = {key: totals.get(key, 0) + value for key, value in added.items()}
    return add_evaluation({**totals, **sums}, record.evaluation, record.round)


def add_evaluation(totals: Mapping[str, float], evaluation: Mapping[str, float], rounds_done: int) -> dict[str, float]:
    """The totals with the accuracy after so many rounds; unchanged by an empty evaluation."""
    if not evaluation:
        return dict(totals)
    accuracy = evaluation["accuracy"]
    best = max(totals["best_accuracy"], accuracy)
    return {**totals, "final_accuracy": accuracy, "best_accuracy": best, "evaluated_round": rounds_done}


class RunLog:
    """A context manager around a run's rounds; silent on ranks other than 0.

    Args:
        rounds_done: rounds before the first of this process.
        num_rounds: rounds of the whole run.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory, runtime: Runtime, rounds_done: int, num_rounds: int):
        self.config, self.directory, self.runtime, self.rounds_done = config, directory, runtime, rounds_done
        self.progress = RoundProgress(config.output.name, num_rounds, rounds_done, runtime.is_main)
        self.writer: MetricsWriter | None = None

    def __enter__(self) -> "RunLog":
        forget_peak_memory(self.runtime.device)
        if self.runtime.is_main:
            # The state first: a complete run that is being made longer must not look complete under its new config.
            self.directory.write_state(RUNNING, self.rounds_done)
            self.directory.write_config(self.config)
            self.writer = MetricsWriter(self.directory, self.rounds_done)
        self.progress.__enter__()
        if self.rounds_done:
            self.note(f"going on after round {self.rounds_done}")
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.__exit__(*error)
        if self.writer is not None:
            self.writer.close()

    def write_setting(self, counts: np.ndarray, num_clients: int, class_names: Sequence[str] | None = None) -> None:
        """The config and the partition, for TensorBoard and reports, on rank 0; counts as `class_counts` gives them."""
        self.directory.write_partition(counts.tolist(), num_clients, class_names)
        self.writer.write_setting(self.config, counts, num_clients)

    def note(self, text: str) -> None:
        """A line that stays on the terminal, after the run's name."""
        self.progress.note(f"{self.directory.path}: {text}")

    def round_done(self, record: RoundRecord) -> None:
        if self.writer is not None:
            row = {**record.row(), "peak_memory_bytes": peak_memory(self.runtime.device)}
            self.writer.write_round(row)
            self.progress.round_done(row)

    def flush(self) -> None:
        """Puts on disk what a checkpoint is about to count."""
        if self.writer is not None:
            self.writer.flush()
