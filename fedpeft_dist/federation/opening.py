"""Opens a run: finds it where it was left, builds what it computes with, and makes sure that all ranks agree.

Shapes: P trainable parameters.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fedpeft_dist.checkpoint import (
    Checkpoint,
    Origin,
    load_newest_checkpoint,
    save_checkpoint,
    set_newer_aside,
)
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import config_digest, parse_config, result_keys, with_values
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation.aggregation import Aggregator
from fedpeft_dist.federation.server_optimizers import ServerOptimizer, make_server_optimizer
from fedpeft_dist.federation.simulation import Simulation
from fedpeft_dist.runtime.collectives import any_rank, assert_same_on_all_ranks, barrier, failing_together
from fedpeft_dist.runtime.interrupts import StoppedEarlyError, StopRequest
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.runtime.versions import library_versions
from fedpeft_dist.tracking.run_directory import (
    INTERRUPTED,
    RUNNING,
    RunDirectory,
    check_same_backbone,
    check_same_data,
    check_same_run,
    check_same_traces,
    is_complete,
    with_choices_of,
)
from fedpeft_dist.tracking.run_lock import Owner, RunLock
from fedpeft_dist.tracking.run_log import NO_TOTALS, vector_bytes
from fedpeft_dist.training.lane_check import check_lanes

LOOK_SECONDS = 1.0


@dataclass
class Run:
    """A run between two rounds, the same on every rank."""

    config: RunConfig
    """With what `auto` stood for."""
    directory: RunDirectory
    simulation: Simulation
    server: ServerOptimizer
    aggregator: Aggregator
    vector: torch.Tensor
    """The global trainable parameters: float32 [P]."""
    next_round: int
    totals: dict[str, float]
    owner: Owner
    """Rank 0, under the lock."""
    lock: RunLock | None
    """Held by rank 0 for as long as the run is open."""
    saved_round: int | None = None
    """`next_round` of the newest checkpoint."""
    looked: float = 0.0
    """When `look_around` did."""

    @property
    def num_rounds(self) -> int:
        """When the run is over: `federation.rounds`, or fewer where its privacy is spent before."""
        plan = self.simulation.privacy_plan
        return self.config.federation.rounds if plan is None else plan.num_rounds

    def close(self) -> None:
        if self.lock is not None:
            self.lock.release()

    def is_ours(self) -> bool:
        """Whether this group may still write the run: a later attempt of its Slurm job may have taken it over."""
        return self.directory.owner() in (self.owner, None)

    def look_around(self, stop: StopRequest) -> None:
        """Asks to stop where the run was taken over; on rank 0, and once in a while at most."""
        if self.lock is not None and time.monotonic() - self.looked > LOOK_SECONDS:
            self.looked = time.monotonic()
            stop.received = stop.received or not self.is_ours()

    def save(self) -> None:
        """Writes a checkpoint of this moment, where there is none of it; called by every rank, done by rank 0."""
        if self.lock is not None and self.saved_round != self.next_round:
            simulation = self.simulation
            backbone, traces = simulation.model.backbone.sha256, simulation.participation.sha256
            origin = Origin.of(self.config, backbone, simulation.data_sha256, traces)
            plan = simulation.privacy_plan
            checkpoint = Checkpoint(
                self.next_round,
                origin,
                self.vector,
                self.server.state,
                self.totals,
                self.aggregator.state,
                None if plan is None else plan.noise_multipliers,
                simulation.noise_seed,
            )
            save_checkpoint(self.directory.checkpoints, checkpoint)
        self.saved_round = self.next_round


def open_run(config: RunConfig, runtime: Runtime, stop: StopRequest | None = None) -> Run | None:
    """The run of a config, at its newest checkpoint where it has one.

    Args:
        stop: ends the reading of data, and the waiting for an earlier attempt of the same Slurm job that still writes
            the run.

    Returns:
        None where nothing is to be done: the run is complete, or it was interrupted under this very launch and only the
        launcher's restart brings it here again.

    Raises:
        ConfigError: on every rank, where any of them finds something that it cannot use.
        StoppedEarlyError: on every rank, where any of them was asked to stop and would not be ready in time, or rank 0
            was while it waited for an earlier attempt.
    """
    directory, stop = RunDirectory(Path(config.output.root) / config.output.name), stop or StopRequest()
    config, state = _look(config, directory, runtime)
    if _is_over(state, config, directory, runtime):
        return None
    with failing_together(runtime):
        # Data may be decoded first, by this process or another one.
        simulation = stop.within_grace(partial(_build, config, runtime, is_new=state is None))
    if any_rank(simulation is None, runtime):
        raise StoppedEarlyError
    traces = simulation.participation.sha256.encode()
    assert_same_on_all_ranks(traces, "the traces of participation", runtime)
    # Only now, so that a config that cannot be run leaves no file.
    owner = Owner.this_process(runtime.launch.slurm_job, runtime.launch.requeues)
    lock, is_stopped = None, False
    with failing_together(runtime):
        try:
            lock = directory.lock(owner, stop) if runtime.is_main else None
        except StoppedEarlyError:
            is_stopped = True
    if any_rank(is_stopped, runtime):
        raise StoppedEarlyError
    run = None
    try:
        run = _open_locked(config, directory, simulation, lock)
    finally:
        if run is None and lock is not None:
            lock.release()
    return run


def _build(config: RunConfig, runtime: Runtime, is_new: bool) -> Simulation:
    simulation = Simulation(config, runtime)
    if runtime.is_main and simulation.model.backbone.warning:
        print(f"warning: {simulation.model.backbone.warning}", file=sys.stderr)
    simulation.participation  # reads traces  # noqa: B018
    check_lanes(simulation.model, config, runtime)
    if is_new:  # else what a checkpoint says of the noise comes first
        simulation.plan_privacy()
    return simulation


def _look(config: RunConfig, directory: RunDirectory, runtime: Runtime) -> tuple[RunConfig, dict | None]:
    """What stands in the directory, the same on all ranks: the config as that run has begun it, and its state."""
    with failing_together(runtime):
        stored, state = directory.stored_config(), directory.read_state()
        if state is None or not is_complete(state, config):
            directory.check_writable()
        if stored is not None:
            config = with_choices_of(stored, config)
            check_same_run(stored, config, directory.path)
    found = json.dumps([result_keys(config), state])
    assert_same_on_all_ranks(found.encode(), "the config, or what stands in the run's directory,", runtime)
    return config, state


def _open_locked(
    config: RunConfig, directory: RunDirectory, simulation: Simulation, lock: RunLock | None
) -> Run | None:
    """Looks again, now that nobody else writes: another process may have while this one was building."""
    runtime = simulation.runtime
    config, state = _look(config, directory, runtime)
    if _is_over(state, config, directory, runtime):
        return None
    simulation.config = config
    with failing_together(runtime):
        checkpoint, damaged = load_newest_checkpoint(directory.checkpoints)
        if checkpoint is not None:
            _check_origin(checkpoint.origin, config, directory, simulation)
            simulation.plan_privacy(checkpoint.noise_multipliers)
            _check_spent(checkpoint.next_round, config, simulation)
        elif simulation.privacy_plan is None:
            simulation.plan_privacy()
    found = "none" if checkpoint is None else f"{checkpoint.next_round} {checkpoint.noise_seed}"
    assert_same_on_all_ranks(found.encode(), "the newest checkpoint", runtime)
    config = with_values(config, "runtime", lanes=simulation.lanes)
    if config.privacy.name == "sample":
        config = with_values(config, "privacy", slots=simulation.slots)
    simulation.seed_noise(config, None if checkpoint is None else checkpoint.noise_seed)
    run = _start(config, directory, simulation, checkpoint, lock)
    found = f"{run.next_round} {simulation.noise_seed} ".encode() + vector_bytes(run.vector)
    assert_same_on_all_ranks(found, "the state before the first round", runtime)
    barrier(runtime)  # nobody writes before everybody has read
    if runtime.is_main:
        if state is not None:  # at once: a restart of this launch must not take an older interruption for its own
            directory.write_state(RUNNING, run.next_round)
        _tell_what_was_found(run, checkpoint, damaged)
        set_newer_aside(directory.checkpoints, run.next_round)
    return run


def _check_origin(origin: Origin, config: RunConfig, directory: RunDirectory, simulation: Simulation) -> None:
    """
    Raises:
        ConfigError: the checkpoint belongs to another config, backbone or data.
    """
    if origin.config_sha256 != config_digest(config):
        check_same_run(parse_config(origin.config, f"{directory.checkpoints}"), config, directory.path)
    check_same_backbone(origin.backbone_sha256, simulation.model.backbone.sha256, directory.path)
    check_same_data(origin.data_sha256, simulation.data_sha256, directory.path)
    check_same_traces(origin.traces_sha256, simulation.participation.sha256, directory.path)


def _check_spent(rounds_done: int, config: RunConfig, simulation: Simulation) -> None:
    """
    Raises:
        ConfigError: a budget that is spent already.
    """
    plan, budget = simulation.privacy_plan, getattr(config.privacy, "stop_at_epsilon", None)
    if budget is not None and (spent := plan.epsilon(rounds_done)) > budget:
        raise ConfigError(
            f"privacy.stop_at_epsilon: {budget:g} is less than the {spent:.4g} that the run's {rounds_done} rounds "
            "have spent; give at least that"
        )


def _tell_what_was_found(run: Run, checkpoint: Checkpoint | None, damaged: Sequence[str]) -> None:
    for line in damaged:
        print(f"{line}; going on {'from the one before' if checkpoint else 'from the beginning'}", file=sys.stderr)
    if checkpoint is None:
        return
    versions, now = checkpoint.origin.versions, library_versions()
    changed = [
        f"{name} {versions.get(name)} there, {now[name]} here" for name in now if versions.get(name) != now[name]
    ]
    if changed:
        print(
            f"{run.directory.path}: begun with other versions ({'; '.join(changed)}), which may round otherwise",
            file=sys.stderr,
        )


def _is_over(state: dict | None, config: RunConfig, directory: RunDirectory, runtime: Runtime) -> bool:
    if state is None:
        return False
    launch, reason = runtime.launch, None
    if is_complete(state, config):
        reason = "already complete"
    if state["state"] == INTERRUPTED and launch.restart and state.get("launch") == launch.job:
        reason = "was interrupted under this launch, a restart does not undo it"
    if reason is not None and runtime.is_main:
        print(f"{directory.path}: {reason}")
    return reason is not None


def _start(
    config: RunConfig,
    directory: RunDirectory,
    simulation: Simulation,
    checkpoint: Checkpoint | None,
    lock: RunLock | None,
) -> Run:
    device = simulation.runtime.device
    owner = lock.owner if lock is not None else directory.owner()
    size = simulation.model.layout.num_parameters
    server = make_server_optimizer(config.server.optimizer, size, device)
    parts = (config, directory, simulation, server, simulation.make_aggregator())
    if checkpoint is None:
        return Run(*parts, simulation.initial_vector, 0, dict(NO_TOTALS), owner, lock)
    for part, state in zip(parts[-2:], (checkpoint.server_state, checkpoint.aggregator_state)):
        for name, tensor in state.items():
            part.state[name].copy_(tensor)
    vector, done = checkpoint.vector.to(device), checkpoint.next_round
    return Run(*parts, vector, done, checkpoint.totals, owner, lock, saved_round=done)
