"""The round loop: sample a cohort, train it, aggregate, step, evaluate, log, checkpoint.

Shapes: P trainable parameters, M cohort.
"""

from __future__ import annotations

import hashlib
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fedpeft_dist.checkpoint import Checkpoint, load_newest_checkpoint, save_checkpoint
from fedpeft_dist.config.load import with_values
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.data.partition import class_counts
from fedpeft_dist.federation.aggregation import Aggregator, RoundTotal
from fedpeft_dist.federation.assignment import assign
from fedpeft_dist.federation.participation import sample_cohort
from fedpeft_dist.federation.server_optimizers import make_server_optimizer
from fedpeft_dist.federation.simulation import Simulation
from fedpeft_dist.runtime.collectives import assert_same_on_all_ranks, barrier
from fedpeft_dist.runtime.interrupts import StopRequest, listen_for_stop
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.tracking.cost import uplink_bytes
from fedpeft_dist.tracking.partition_view import MAX_CLIENTS
from fedpeft_dist.tracking.progress import RoundProgress
from fedpeft_dist.tracking.run_directory import (
    COMPLETE,
    FAILED,
    INTERRUPTED,
    RUNNING,
    RunDirectory,
    check_same_backbone,
    check_same_run,
)
from fedpeft_dist.tracking.writer import MetricsWriter
from fedpeft_dist.training.rates import rate_factor


def run_federation(config: RunConfig, runtime: Runtime) -> str:
    """Runs a config, from its newest checkpoint where it has one, and leaves its directory complete.

    Returns:
        `complete`, or `interrupted` where a signal stopped it at a round boundary, with a checkpoint written.

    Raises:
        ConfigError: a config that cannot be run, or a directory that holds another run.
    """
    directory = RunDirectory(Path(config.output.root) / config.output.name)
    stored = directory.stored_config()
    if stored is not None:
        config = _keep_choices(config, stored)
        check_same_run(stored, config, directory.path)
        if directory.state() == COMPLETE and config.federation.rounds == stored.federation.rounds:
            if runtime.is_main:
                print(f"{directory.path}: already complete")
            return COMPLETE
    directory.check_writable()
    simulation = Simulation(config, runtime)
    config = with_values(config, "runtime", lanes=simulation.lanes)
    checkpoint = load_newest_checkpoint(directory.checkpoints)
    run = _Run(config, simulation, directory, checkpoint)
    barrier()  # nobody writes before everybody has read
    with listen_for_stop() as stop:
        try:
            return run.play(stop)
        except BaseException:
            if runtime.is_main:
                directory.write_state(FAILED, run.next_round)
            raise


class _Run:
    """The state of a run between rounds, and what a round does to it."""

    def __init__(
        self, config: RunConfig, simulation: Simulation, directory: RunDirectory, checkpoint: Checkpoint | None
    ):
        self.config, self.simulation, self.directory = config, simulation, directory
        self.runtime = simulation.runtime
        device, size = self.runtime.device, simulation.model.layout.num_parameters
        self.vector = simulation.initial_vector
        self.server = make_server_optimizer(config.server.optimizer, size, device)
        largest = simulation.partition.largest_total(config.federation.cohort)
        self.aggregator = Aggregator(size, largest, device)
        self.next_round = 0
        self.totals: dict[str, float] = {"rejected": 0, "samples": 0, "seconds": 0.0, "best_accuracy": 0.0}
        self.backbone_sha256 = simulation.model.backbone.sha256
        if checkpoint is not None:
            check_same_backbone(checkpoint.backbone_sha256, self.backbone_sha256, directory.path)
            self.next_round, self.totals = checkpoint.next_round, checkpoint.totals
            self.vector = checkpoint.vector.to(device)
            for name, tensor in checkpoint.server_state.items():
                self.server.state[name].copy_(tensor)
        assert_same_on_all_ranks(_bytes(self.vector), "the global vector before the first round", self.runtime)

    def play(self, stop: StopRequest) -> str:
        """Runs the rounds that are left."""
        num_rounds, first = self.config.federation.rounds, self.next_round
        writer = self._open_files() if self.runtime.is_main else None
        stopped = False
        with RoundProgress(self.config.output.name, num_rounds, first, self.runtime.is_main) as progress:
            if first:
                progress.note(f"{self.directory.path}: going on after round {first}")
            while self.next_round < num_rounds and not stopped:
                row, stopped = self._round(stop, progress)
                if writer is not None:
                    writer.write_round(row)
                    if self._is_due(self.config.output.checkpoint_every) or stopped:
                        self._save()
                progress.round_done(row)
        if writer is not None:
            writer.close()
            self._close_files()
        barrier()
        return COMPLETE if self.next_round == num_rounds else INTERRUPTED

    def _round(self, stop: StopRequest, progress: RoundProgress) -> tuple[dict[str, Any], bool]:
        """One round on this rank: its metrics, and whether some rank was asked to stop."""
        started = time.perf_counter()
        total = self._train_cohort(stop, progress)
        if total.mean_delta is not None:
            self.vector = self.server.step(self.vector, -total.mean_delta)
        trained = time.perf_counter()
        self.next_round += 1
        evaluation = {}
        if self._is_due(self.config.federation.evaluate_every):
            evaluation = self.simulation.evaluate(self.vector)
            self.totals["best_accuracy"] = max(self.totals["best_accuracy"], evaluation["accuracy"])
            self.totals["final_accuracy"] = evaluation["accuracy"]
        seconds, evaluate_seconds = trained - started, time.perf_counter() - trained
        self.totals["rejected"] += total.num_rejected
        self.totals["samples"] += total.num_samples
        self.totals["seconds"] += seconds
        cohort = self.config.federation.cohort
        link = uplink_bytes(len(self.vector), cohort)
        row = {
            "round": self.next_round,
            "accuracy": None,
            **evaluation,
            "train_loss": total.train_loss,
            "cohort": cohort,
            "rejected": total.num_rejected,
            "uplink_bytes": link,
            "downlink_bytes": link,
            "seconds": seconds,
            "evaluate_seconds": evaluate_seconds,
            "samples": total.num_samples,
            "samples_per_second": total.num_samples / seconds,
            "peak_memory_bytes": _peak_memory(self.runtime),
        }
        return row, total.stop_requested

    def _train_cohort(self, stop: StopRequest, progress: RoundProgress) -> RoundTotal:
        """Trains this rank's share of the round's cohort and sums over all ranks."""
        config, simulation = self.config, self.simulation
        federation, round_number = config.federation, self.next_round
        population = simulation.partition.num_clients
        cohort = sample_cohort(federation.participation, population, federation.cohort, config.seed, round_number)
        shard = assign(simulation.tasks(cohort), self.runtime.world_size)[self.runtime.rank]
        samples = {task.client: _samples_processed(config, task.weight, task.num_steps) for task in shard}
        factor = rate_factor(config.client.schedule, round_number, federation.rounds)
        for update in simulation.trainer.train(shard, self.vector, round_number, factor):
            self.aggregator.add(update, samples[update.client])
        for client in self.aggregator.rejected_clients():
            print(f"round {round_number + 1}: client {client} is rejected, its delta is not finite or too large")
        return self.aggregator.reduce(stop.received)

    def _is_due(self, every: int) -> bool:
        """Whether something done every so many rounds (0: at the end only) is to be done after the round just run."""
        last = self.next_round == self.config.federation.rounds
        return last or (every > 0 and self.next_round % every == 0)

    def _open_files(self) -> MetricsWriter:
        simulation = self.simulation
        self.directory.write_config(self.config)
        self.directory.write_state(RUNNING, self.next_round)
        writer = MetricsWriter(self.directory, self.next_round)
        labels, classes = simulation.dataset.train.labels, simulation.dataset.num_classes
        counts = class_counts(simulation.partition, labels, classes, MAX_CLIENTS)
        writer.write_setting(self.config, counts, simulation.partition.num_clients)
        return writer

    def _save(self) -> None:
        checkpoint = Checkpoint(self.next_round, self.backbone_sha256, self.vector, self.server.state, self.totals)
        save_checkpoint(self.directory.checkpoints, checkpoint)

    def _close_files(self) -> None:
        """What is left of a run that is over: its parameters and summary, or the word that it was interrupted."""
        if self.next_round < self.config.federation.rounds:
            self.directory.write_state(INTERRUPTED, self.next_round)
            return
        layout = self.simulation.model.layout
        digest = hashlib.sha256(_bytes(self.vector)).hexdigest()
        metadata = {
            "method": self.config.method.name,
            "backbone": self.config.backbone.name,
            "backbone_sha256": self.backbone_sha256,
            "weights_sha256": digest,
        }
        self.directory.write_trainable(layout.split(self.vector), metadata)
        self.directory.write_summary(self._summary(digest))
        self.directory.write_state(COMPLETE, self.next_round)

    def _summary(self, digest: str) -> dict[str, Any]:
        config, totals = self.config, self.totals
        link = uplink_bytes(len(self.vector), config.federation.cohort) * config.federation.rounds
        return {
            "method": config.method.name,
            "trainable_parameters": len(self.vector),
            "backbone_parameters": self.simulation.model.backbone.num_parameters,
            "rounds": config.federation.rounds,
            "final_accuracy": totals["final_accuracy"],
            "best_accuracy": totals["best_accuracy"],
            "uplink_bytes_total": link,
            "downlink_bytes_total": link,
            "rejected_total": int(totals["rejected"]),
            "samples_per_second": totals["samples"] / totals["seconds"],
            "lanes": self.simulation.lanes,
            "world_size": self.runtime.world_size,
            "weights_sha256": digest,
            "privacy": None,
        }


def _samples_processed(config: RunConfig, num_samples: int, num_steps: int) -> int:
    """Training samples that a client goes through in a round, repetitions counted."""
    if config.client.steps is None:
        return num_samples * config.client.epochs
    steps_per_epoch = -(-num_samples // config.client.batch_size)
    epochs, rest = divmod(num_steps, max(steps_per_epoch, 1))
    return epochs * num_samples + min(rest * config.client.batch_size, num_samples)


def _keep_choices(config: RunConfig, stored: RunConfig) -> RunConfig:
    """`auto` means, for a run that has begun, what it meant then."""
    lanes = stored.runtime.lanes if config.runtime.lanes == "auto" else config.runtime.lanes
    return with_values(config, "runtime", lanes=lanes)


def _bytes(vector: torch.Tensor) -> bytes:
    """A float32 vector as little-endian bytes."""
    return vector.cpu().numpy().astype("<f4").tobytes()


def _peak_memory(runtime: Runtime) -> int:
    """Of this rank: on the GPU, or the process's resident memory."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
