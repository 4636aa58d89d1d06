"""The round loop: plan who takes part, train them, aggregate, step, evaluate, log, checkpoint."""

from __future__ import annotations

import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import with_values
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.data.partition import class_counts
from fedpeft_dist.federation.assignment import assign
from fedpeft_dist.federation.opening import Run, open_run
from fedpeft_dist.privacy.statements import describe as describe_privacy
from fedpeft_dist.privacy.statements import summarize
from fedpeft_dist.runtime import process
from fedpeft_dist.runtime.collectives import any_rank, barrier
from fedpeft_dist.runtime.files import DISK_FULL
from fedpeft_dist.runtime.interrupts import StoppedEarlyError, StopRequest, listen_for_stop
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.tracking.partition_view import MAX_CLIENTS
from fedpeft_dist.tracking.run_directory import COMPLETE, FAILED, INTERRUPTED, RUNNING
from fedpeft_dist.tracking.run_log import RunLog
from fedpeft_dist.training.rates import rate_factor


def start_and_run(config: RunConfig, stop: StopRequest | None = None) -> str:
    """Sets this process up as the config's runtime says and runs the config; returns what `run_federation` does.

    Args:
        stop: of a caller that listens for signals itself; None listens here, for as long as the run lasts.

    Raises:
        ConfigError: as `run_federation`, and for a device or a precision that this machine lacks.
    """
    with process.start(config.runtime) as runtime:
        # What auto means on some GPUs, and the schema refuses where a config asks for it.
        if runtime.precision == "fp16" and config.privacy.name != "none":
            runtime = replace(runtime, precision="fp32")
        choices = {"device": runtime.device.type, "precision": runtime.precision}
        return run_federation(with_values(config, "runtime", **choices), runtime, stop)


def run_federation(config: RunConfig, runtime: Runtime, stop: StopRequest | None = None) -> str:
    """Runs a config, from its newest checkpoint where it has one, and leaves its directory complete.

    Returns:
        `complete`, or `interrupted` where a signal stopped it: at a round boundary, with a checkpoint written, or
        before there was anything to write.

    Raises:
        ConfigError: a config that cannot be run, a directory that holds another run, a full disk.
        PeerLostError: another rank has died, failed or fallen silent.
    """
    run: Run | None = None
    with listen_for_stop() if stop is None else nullcontext(stop) as stop:
        if runtime.peers is not None:
            runtime.peers.stop = stop
        try:
            run = open_run(config, runtime, stop)
            return COMPLETE if run is None else run_rounds(run, runtime, stop)
        except StoppedEarlyError:
            return INTERRUPTED
        except BaseException as error:
            full = _no_room(error, config)
            if run is not None:  # else what stands there may be another process's
                _mark_failed(run, " ".join(str(full or error).split()) or type(error).__name__)
            if full is not None:
                raise full from error
            raise
        finally:
            if run is not None:
                run.close()


def run_rounds(run: Run, runtime: Runtime, stop: StopRequest) -> str:
    """Runs the rounds that are left; returns `complete` or `interrupted`."""
    config, simulation = run.config, run.simulation
    dataset, population = simulation.dataset, simulation.partition.num_clients
    if runtime.peers is not None:
        runtime.peers.last_will = partial(_mark_failed, run)
    with RunLog(config, run.directory, runtime, run.totals, run.next_round, run.num_rounds) as log:
        if runtime.is_main:
            counts = class_counts(simulation.partition, dataset.train.labels, dataset.num_classes, MAX_CLIENTS)
            log.write_setting(counts, population, dataset.class_names)
            if note := simulation.participation.describe():
                log.progress.note(f"{run.directory.path}: {note}")
            plan = simulation.privacy_plan
            figures = None if plan is None else plan.figures(run.num_rounds)
            for line in describe_privacy(config.privacy, figures, None if plan is None else plan.warning):
                log.progress.note(f"{run.directory.path}: {line}")
        stopped = any_rank(stop.received, runtime)
        while run.next_round < run.num_rounds and not stopped:
            stopped = run_round(run, log, runtime, stop)
        if run.next_round < run.num_rounds:
            if run.is_ours():
                run.save()
                log.interrupted()
            elif runtime.is_main:
                print(f"{run.directory.path}: taken over by {run.directory.owner()}", flush=True)
            barrier(runtime)
            return INTERRUPTED
        if not log.is_evaluated:  # an earlier end than the one that the last round was run for
            log.evaluated(simulation.evaluate(run.vector))
        backbone, privacy = simulation.model.backbone, _spent(run) if runtime.is_main else None
        origin = {"backbone_sha256": backbone.sha256, **simulation.recipe.metadata()}
        log.complete(run.vector, simulation.model.layout, backbone.num_parameters, origin, privacy)
    barrier(runtime)
    return COMPLETE


def _spent(run: Run) -> dict[str, Any] | None:
    """A summary's `privacy`."""
    plan, aggregator = run.simulation.privacy_plan, run.aggregator
    figures = None if plan is None else plan.figures(run.next_round)
    return summarize(run.config.privacy, figures if figures is None else figures | aggregator.figures())


def run_round(run: Run, log: RunLog, runtime: Runtime, stop: StopRequest) -> bool:
    """Runs the next round, or drops it where it would last too long after a request to stop.

    Returns:
        Whether to stop, the same on every rank.
    """
    config, simulation, federation, aggregator = run.config, run.simulation, run.config.federation, run.aggregator
    started, round_number = time.perf_counter(), run.next_round
    plan = simulation.participation.plan(round_number)
    tasks = simulation.tasks(assign(plan.steps, runtime.world_size)[runtime.rank], plan.steps)
    factor = rate_factor(config.client.schedule, round_number, federation.rounds)
    before = run.vector, run.server.state, aggregator.state

    def is_dropped() -> bool:
        run.look_around(stop)
        return stop.is_overdue()

    for update in simulation.trainer.train(tasks, run.vector, round_number, factor, is_dropped):
        aggregator.add(update)
    rejected = aggregator.rejected_clients()
    lost = runtime.is_main and not run.is_ours()
    bounds = aggregator.figures()
    total = aggregator.reduce(round_number, stop.received or lost, stop.is_overdue() or lost)
    if total.is_dropped:
        return True
    for client in rejected:
        print(f"round {round_number + 1}: client {client} is rejected, its delta is not finite or too large")
    if not plan.steps and runtime.is_main:
        what = "the round is skipped" if total.mean_delta is None else "its step is noise alone"
        print(f"round {round_number + 1}: no client's update arrives ({plan.selected} selected), {what}")
    if total.mean_delta is not None:
        run.vector = run.server.step(run.vector, -total.mean_delta)
    trained = time.perf_counter()

    evaluate = _is_due(round_number + 1, federation.evaluate_every, run.num_rounds)
    try:
        evaluation = simulation.evaluate(run.vector, is_dropped) if evaluate else {}
    except StoppedEarlyError:
        run.vector, run.server.state, aggregator.state = before
        return True
    run.next_round = round_number + 1
    spending = {}
    if simulation.privacy_plan is not None:
        spent = simulation.privacy_plan.epsilon(run.next_round) if evaluate and runtime.is_main else None
        spending = {"epsilon": spent, **bounds}
    log.round_done(
        evaluation,
        total.train_loss,
        total.num_rejected,
        total.num_samples,
        len(run.vector),
        plan.cohort,
        plan.selected,
        {} if federation.participation.is_ideal else plan.figures(),
        spending,
        seconds=trained - started,
        evaluate_seconds=time.perf_counter() - trained,
    )
    if _is_due(run.next_round, config.output.checkpoint_every, run.num_rounds):
        log.flush()
        run.save()
    # Who was asked during the evaluation begins no other round.
    return total.stop_requested or (evaluate and any_rank(stop.received, runtime))


def _is_due(rounds_done: int, every: int, num_rounds: int) -> bool:
    """Whether something done every so many rounds (0: at the end only) is to be done now."""
    return rounds_done == num_rounds or (every > 0 and rounds_done % every == 0)


def _no_room(error: BaseException, config: RunConfig) -> ConfigError | None:
    """What to tell where the disk was full."""
    if not isinstance(error, OSError) or error.errno not in DISK_FULL:
        return None
    place = error.filename or Path(config.output.root) / config.output.name
    return ConfigError(
        f"{place}: cannot be written ({error.strerror}); make room, then run the same command to go on from the newest "
        "checkpoint"
    )


def _mark_failed(run: Run, reason: str) -> None:
    """By whichever rank it hits first: the others may be stuck, or killed before they can."""
    with suppress(OSError, ConfigError):  # there may be no room for it; what the run did is in its checkpoints
        state = run.directory.read_state()
        if state is not None and state["state"] == RUNNING and run.is_ours():
            run.directory.write_state(FAILED, run.saved_round or 0, error=reason)
