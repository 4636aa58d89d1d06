"""Opens a run: locks its directory, reads what stands there, builds the simulation, and makes sure that ranks agree.

Nothing but the lock is written before all of that has succeeded, so a config that cannot be run leaves no file.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedpeft_dist.algorithms.state import State
from fedpeft_dist.checkpoint import Checkpoint, Origin, load_newest_checkpoint, save_checkpoint, set_newer_aside
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import config_digest, parse_config, result_keys
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation.setup import Setup
from fedpeft_dist.federation.simulation import Preparation, Simulation, prepare
from fedpeft_dist.federation.watch import Watch
from fedpeft_dist.runtime.collectives import any_rank, assert_same_on_all_ranks, barrier, failing_together
from fedpeft_dist.runtime.interrupts import StoppedEarlyError, StopRequest
from fedpeft_dist.runtime.launch import Launch
from fedpeft_dist.runtime.process import Runtime, library_versions
from fedpeft_dist.tracking.run_directory import FAILED, INTERRUPTED, RUNNING, RunDirectory
from fedpeft_dist.tracking.run_lock import Owner, RunLock
from fedpeft_dist.tracking.same_run import check_same, check_same_run, is_complete, with_choices_of
from fedpeft_dist.training.lane_check import check_lanes, verify_lanes


@dataclass
class OpenRun:
    """A run that this group of ranks is writing."""

    directory: RunDirectory
    simulation: Simulation
    state: State
    """The state that the run goes on from."""
    watch: Watch
    saved_round: int | None
    """Rounds done in the newest checkpoint."""

    def is_ours(self) -> bool:
        """Whether this group may still write: a later attempt of its Slurm job may have taken the run over."""
        return self.watch.lock is None or self.watch.lock.is_ours()

    def save(self, state: State) -> None:
        """Writes a checkpoint of the state unless there is one; called by every rank, done by rank 0."""
        if self.watch.lock is not None and self.saved_round != state.round:
            simulation = self.simulation
            setup, traces = simulation.setup, simulation.participation.sha256
            digests = (setup.model.backbone.sha256, setup.data_sha256, traces, setup.start.sha256)
            origin = Origin.of(simulation.config, *digests)
            save_checkpoint(self.directory.checkpoints, Checkpoint(state, origin, simulation.noise))
        self.saved_round = state.round

    def mark_failed(self, reason: str) -> None:
        """Writes the state `failed`; by whichever rank fails first, as the others may be stuck or killed."""
        with suppress(OSError, ConfigError):  # the disk may be full; the checkpoints say what the run did
            state = self.directory.read_state()
            if state is not None and state["state"] == RUNNING and self.is_ours():
                self.directory.write_state(FAILED, self.saved_round or 0, error=reason)


@contextmanager
def open_run(config: RunConfig, runtime: Runtime, stop: StopRequest) -> Iterator[OpenRun | None]:
    """The run of a config at its newest checkpoint, if it has one; a context manager, which holds the lock.

    Args:
        stop: ends the reading of data, and the wait for an earlier attempt of the same Slurm job that still writes.

    Yields:
        None if nothing is to be done: the run is complete, or it was interrupted under this very launch and only the
        launcher's restart brings it here again.

    Raises:
        ConfigError: on every rank, if any of them finds something that it cannot use.
        StoppedEarlyError: on every rank, if any of them was asked to stop and would not be ready in time.
    """
    directory = RunDirectory(Path(config.output.root) / config.output.name)
    lock, refusal = _lock(directory, runtime, stop)
    try:
        found = _read(config, directory, runtime, refusal)
        yield None if found is None else _build(found, runtime, Watch(stop, lock))
    finally:
        if lock is not None:
            lock.release()


@dataclass(frozen=True)
class _Found:
    """What stands in a run's directory."""

    directory: RunDirectory
    config: RunConfig
    """The config with the values that `auto` stood for when the run began."""
    state: dict[str, Any] | None
    """The content of state.json; None in a new directory."""
    checkpoint: Checkpoint | None
    damaged: list[str]
    """A line on each checkpoint that is newer and damaged."""

    def tell(self) -> None:
        """Says what is unusual about it."""
        for line in self.damaged:
            print(f"{line}; going on from the {'one before' if self.checkpoint else 'beginning'}", file=sys.stderr)
        then, now = {} if self.checkpoint is None else self.checkpoint.origin.versions, library_versions()
        changed = [f"{k} {then[k]} there, {now[k]} here" for k in now if k in then and then[k] != now[k]]
        if changed:
            told = f"begun with other versions ({'; '.join(changed)}), which may round otherwise"
            print(f"{self.directory.path}: {told}", file=sys.stderr)


def _lock(directory: RunDirectory, runtime: Runtime, stop: StopRequest) -> tuple[RunLock | None, ConfigError | None]:
    """Rank 0's lock, or why the directory cannot be written, which a complete run does not mind."""
    lock, refusal, is_stopped = None, None, False
    with failing_together(runtime):
        if runtime.is_main:
            try:
                directory.check_writable()
            except ConfigError as error:
                refusal = error
            else:
                owner = Owner.this_process(runtime.launch.slurm_job, runtime.launch.requeues)
                try:
                    lock = directory.lock(owner, stop)
                except StoppedEarlyError:
                    is_stopped = True
    if any_rank(is_stopped, runtime):
        raise StoppedEarlyError
    return lock, refusal


def _read(config: RunConfig, directory: RunDirectory, runtime: Runtime, refusal: ConfigError | None) -> _Found | None:
    """What stands in the directory, the same on all ranks; None if nothing is to be done, and says why."""
    checkpoint, damaged, reason = None, [], None
    with failing_together(runtime):
        stored, state = directory.stored_config(), directory.read_state()
        if stored is not None:
            config = with_choices_of(stored, config)
            check_same_run(stored, config, directory.path)
        if state is not None and is_complete(state, config):
            reason = "already complete"
        elif refusal is not None:
            raise refusal
        elif state is not None and state["state"] == INTERRUPTED and _is_restart_of(state, runtime.launch):
            reason = "was interrupted under this launch, a restart does not undo it"
        else:
            checkpoint, damaged = load_newest_checkpoint(directory.checkpoints)
    where = None if checkpoint is None else [checkpoint.state.round, checkpoint.noise and checkpoint.noise.seed]
    told = json.dumps([result_keys(config), state, where]).encode()
    assert_same_on_all_ranks(told, "the config, or what stands in the run's directory,", runtime)
    if reason is None:
        return _Found(directory, config, state, checkpoint, damaged)
    if runtime.is_main:
        print(f"{directory.path}: {reason}")
    return None


def _is_restart_of(state: dict[str, Any], launch: Launch) -> bool:
    """Whether a launcher has started the ranks again under which the run was interrupted."""
    return bool(launch.restart) and state.get("launch") == launch.job


def _build(found: _Found, runtime: Runtime, watch: Watch) -> OpenRun:
    with failing_together(runtime):
        # Data may be decoded first, by this process or another one.
        preparation = watch.stop.within_grace(lambda: _prepare(found, runtime))
    if any_rank(preparation is None, runtime):
        raise StoppedEarlyError
    assert_same_on_all_ranks(preparation.participation.sha256.encode(), "the traces of participation", runtime)
    assert_same_on_all_ranks(preparation.setup.products.encode(), "what runtime.products: auto stands for", runtime)
    with failing_together(runtime):
        setup = preparation.setup
        setup.share_weights()
        check_lanes(setup.model, found.config, runtime)
    checkpoint, directory = found.checkpoint, found.directory
    simulation = Simulation(preparation, None if checkpoint is None else checkpoint.noise)
    state = simulation.initial_state() if checkpoint is None else _on_device(checkpoint.state, runtime.device)
    told = f"{state.round} {simulation.noise and simulation.noise.seed} ".encode()
    told += state.vector.cpu().numpy().tobytes()
    assert_same_on_all_ranks(told, "the state before the first round", runtime)
    if simulation.config.runtime.verify:
        rows, samples = simulation.pass_shape
        verify_lanes(rows, samples, simulation.setup.model, simulation.setup.train_store, runtime)
        if runtime.is_main:
            print("verified: a client's gradient depends neither on its lane nor on its neighbours")
    barrier(runtime)  # nobody writes before everybody has read
    if runtime.is_main:
        if found.state is not None:  # now: a restart of this launch must not take an older interruption for its own
            directory.write_state(RUNNING, state.round)
        found.tell()
        set_newer_aside(directory.checkpoints, state.round)
    return OpenRun(directory, simulation, state, watch, None if checkpoint is None else state.round)


def _prepare(found: _Found, runtime: Runtime) -> Preparation:
    """Builds what each rank builds by itself, and checks that it goes with the checkpoint."""
    config, checkpoint = found.config, found.checkpoint
    setup = Setup(config, runtime)
    if runtime.is_main and setup.model.backbone.warning:
        print(f"warning: {setup.model.backbone.warning}", file=sys.stderr)
    if checkpoint is None:
        return prepare(setup)
    origin, path = checkpoint.origin, found.directory.path
    if origin.config_sha256 != config_digest(config):
        check_same_run(parse_config(origin.config, f"{found.directory.checkpoints}"), config, path)
    check_same(origin.backbone_sha256, setup.model.backbone.sha256, path, "backbone")
    check_same(origin.data_sha256, setup.data_sha256, path, "data")
    check_same(origin.start_sha256, setup.start.sha256, path, "start")
    preparation = prepare(setup, checkpoint.noise)
    check_same(origin.traces_sha256, preparation.participation.sha256, path, "traces")
    plan, budget = preparation.privacy_plan, getattr(config.privacy, "stop_at_epsilon", None)
    if budget is not None and (spent := plan.epsilon(checkpoint.state.round)) > budget:
        raise ConfigError(
            f"privacy.stop_at_epsilon: {budget:g} is less than the {spent:.4g} that the run's {checkpoint.state.round} "
            "rounds have spent; give at least that"
        )
    return preparation


def _on_device(state: State, device: torch.device) -> State:
    """A checkpoint's state, with the tensors that rounds compute with on the device."""
    own = {"clip_norm"}  # read on the host
    server = {name: tensor.to(device) for name, tensor in state.server.items()}
    algorithm = {name: tensor if name in own else tensor.to(device) for name, tensor in state.algorithm.items()}
    return replace(state, vector=state.vector.to(device), server=server, algorithm=algorithm)
