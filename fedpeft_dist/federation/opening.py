"""Opens a run: finds it where it was left, builds what it computes with, and makes sure that all ranks agree.

Shapes: P trainable parameters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from fedpeft_dist.checkpoint import Checkpoint, load_newest_checkpoint, save_checkpoint
from fedpeft_dist.config.load import result_keys, with_values
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation.server_optimizers import ServerOptimizer, make_server_optimizer
from fedpeft_dist.federation.simulation import Simulation
from fedpeft_dist.runtime.collectives import assert_same_on_all_ranks, barrier, failing_together
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.tracking.run_directory import (
    COMPLETE,
    INTERRUPTED,
    RunDirectory,
    check_same_backbone,
    check_same_data,
    check_same_run,
)
from fedpeft_dist.tracking.run_log import NO_TOTALS, vector_bytes


@dataclass
class Run:
    """A run between two rounds, the same on every rank."""

    config: RunConfig
    """With what `auto` stood for."""
    directory: RunDirectory
    simulation: Simulation
    server: ServerOptimizer
    vector: torch.Tensor
    """The global trainable parameters: float32 [P]."""
    next_round: int
    totals: dict[str, float]
    lock: FileLock | None
    """Held by rank 0 for as long as the run is open."""

    def close(self) -> None:
        if self.lock is not None:
            self.lock.release()

    def save(self) -> None:
        """Writes a checkpoint of this moment."""
        backbone = self.simulation.model.backbone.sha256
        data = self.simulation.data_sha256
        checkpoint = Checkpoint(self.next_round, backbone, data, self.vector, self.server.state, self.totals)
        save_checkpoint(self.directory.checkpoints, checkpoint)


def open_run(config: RunConfig, runtime: Runtime) -> Run | None:
    """The run of a config, at its newest checkpoint where it has one.

    Returns:
        None where nothing is to be done: the run is complete, or it was interrupted under this very launch and only the
        launcher's restart brings it here again.

    Raises:
        ConfigError: on every rank, where any of them finds something that it cannot use.
    """
    directory = RunDirectory(Path(config.output.root) / config.output.name)
    config, state = _look(config, directory, runtime)
    if _is_over(state, config, directory, runtime):
        return None
    with failing_together(runtime):
        simulation = Simulation(config, runtime)
    # Only now, so that a config that cannot be run leaves no file.
    with failing_together(runtime):
        lock = directory.lock() if runtime.is_main else None
    run = None
    try:
        run = _open_locked(config, directory, simulation, lock)
    finally:
        if run is None and lock is not None:
            lock.release()
    return run


def _look(config: RunConfig, directory: RunDirectory, runtime: Runtime) -> tuple[RunConfig, dict | None]:
    """What stands in the directory, the same on all ranks: the config as that run has begun it, and its state."""
    with failing_together(runtime):
        directory.check_writable()
        stored, state = directory.stored_config(), directory.read_state()
        if stored is not None:
            if config.runtime.lanes == "auto":  # means, for a run that has begun, what it meant then
                config = with_values(config, "runtime", lanes=stored.runtime.lanes)
            check_same_run(stored, config, directory.path)
    found = json.dumps([result_keys(config), state])
    assert_same_on_all_ranks(found.encode(), "the config, or what stands in the run's directory,", runtime)
    return config, state


def _open_locked(
    config: RunConfig, directory: RunDirectory, simulation: Simulation, lock: FileLock | None
) -> Run | None:
    """Looks again, now that nobody else writes: another process may have while this one was building."""
    runtime = simulation.runtime
    config, state = _look(config, directory, runtime)
    if _is_over(state, config, directory, runtime):
        return None
    simulation.config = config
    with failing_together(runtime):
        checkpoint = load_newest_checkpoint(directory.checkpoints)
        if checkpoint is not None:
            check_same_backbone(checkpoint.backbone_sha256, simulation.model.backbone.sha256, directory.path)
            check_same_data(checkpoint.data_sha256, simulation.data_sha256, directory.path)
    config = with_values(config, "runtime", lanes=simulation.lanes)
    run = _start(config, directory, simulation, checkpoint, lock)
    assert_same_on_all_ranks(vector_bytes(run.vector), "the global vector before the first round", runtime)
    barrier()  # nobody writes before everybody has read
    return run


def _is_over(state: dict | None, config: RunConfig, directory: RunDirectory, runtime: Runtime) -> bool:
    if state is None:
        return False
    launch, reason = runtime.launch, None
    if state["state"] == COMPLETE and state["next_round"] >= config.federation.rounds:
        reason = "already complete"
    # Only torchrun names its launch; a job that Slurm has put back into its queue is there to go on.
    if state["state"] == INTERRUPTED and launch.restart and launch.job and state.get("launch") == launch.job:
        reason = "was interrupted under this launch, a restart does not undo it"
    if reason is not None and runtime.is_main:
        print(f"{directory.path}: {reason}")
    return reason is not None


def _start(
    config: RunConfig,
    directory: RunDirectory,
    simulation: Simulation,
    checkpoint: Checkpoint | None,
    lock: FileLock | None,
) -> Run:
    device = simulation.runtime.device
    size = simulation.model.layout.num_parameters
    server = make_server_optimizer(config.server.optimizer, size, device)
    if checkpoint is None:
        return Run(config, directory, simulation, server, simulation.initial_vector, 0, dict(NO_TOTALS), lock)
    for name, tensor in checkpoint.server_state.items():
        server.state[name].copy_(tensor)
    vector = checkpoint.vector.to(device)
    return Run(config, directory, simulation, server, vector, checkpoint.next_round, checkpoint.totals, lock)
