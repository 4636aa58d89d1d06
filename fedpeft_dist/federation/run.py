"""A whole run: open it, run its rounds, leave its directory complete."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from fedpeft_dist.algorithms.state import State
from fedpeft_dist.config.errors import ConfigError, one_line
from fedpeft_dist.config.load import with_values
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.data.partition import class_counts
from fedpeft_dist.federation.opening import OpenRun, open_run
from fedpeft_dist.federation.result import write_result
from fedpeft_dist.federation.round import is_due, run_round
from fedpeft_dist.privacy.statements import describe as describe_privacy
from fedpeft_dist.runtime import process
from fedpeft_dist.runtime.collectives import any_rank, barrier
from fedpeft_dist.runtime.files import DISK_FULL
from fedpeft_dist.runtime.interrupts import StoppedEarlyError, StopRequest, listen_for_stop
from fedpeft_dist.runtime.mesh import spread
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.tracking.partition_view import MAX_CLIENTS
from fedpeft_dist.tracking.run_directory import COMPLETE, INTERRUPTED
from fedpeft_dist.tracking.run_log import RunLog, add_evaluation


def run(config: RunConfig, stop: StopRequest | None = None, runtime: Runtime | None = None) -> str:
    """Runs a config, from its newest checkpoint if it has one, and leaves its directory complete.

    Args:
        stop: of a caller that listens for signals itself; None listens here while the run lasts.
        runtime: of a caller that has set this process up itself; None sets it up as the config says.

    Returns:
        `complete`, or `interrupted` if a signal stopped it: at a round boundary, with a checkpoint written, or before
        there was anything to write.

    Raises:
        ConfigError: a config that cannot be run, a directory that holds another run, a full disk.
        PeerLostError: another rank has died, failed or fallen silent.
    """
    with listen_for_stop() if stop is None else nullcontext(stop) as stop, _start(config, runtime, stop) as runtime:
        config = with_values(config, "runtime", device=runtime.device.type, precision=runtime.precision)
        try:
            with _telling_full_disk(config), open_run(config, runtime, stop) as opened:
                if opened is None:
                    return COMPLETE
                simulation, state = opened.simulation, opened.state
                with _marking_failures(opened, runtime), _log(opened, runtime) as log:
                    stopped = any_rank(stop.received, runtime)
                    while state.round < simulation.num_rounds and not stopped:
                        result = run_round(state, simulation, opened.watch)
                        if result is None:
                            break
                        state, stopped = result.state, result.is_last
                        log.round_done(result.record)
                        if is_due(state.round, config.output.checkpoint_every, simulation.num_rounds):
                            log.flush()
                            opened.save(state)
                    return _finish(state, opened, runtime)
        except StoppedEarlyError:
            return INTERRUPTED


@contextmanager
def _start(config: RunConfig, runtime: Runtime | None, stop: StopRequest) -> Iterator[Runtime]:
    with process.start(config.runtime) if runtime is None else nullcontext(runtime) as runtime:
        # `auto` means fp16 on some GPUs, where the schema refuses it.
        if runtime.precision == "fp16" and (config.privacy.name != "none" or not config.algorithm.allows_fp16):
            runtime = replace(runtime, precision="fp32")
        if runtime.peers is not None:
            runtime.peers.stop = stop
        with spread(runtime, config.runtime.sharding) as runtime:
            yield runtime


@contextmanager
def _log(opened: OpenRun, runtime: Runtime) -> Iterator[RunLog]:
    """The run's log, with what there is to say before the first round."""
    simulation, state = opened.simulation, opened.state
    setup, config = simulation.setup, simulation.config
    with RunLog(config, opened.directory, runtime, state.round, simulation.num_rounds) as log:
        if runtime.is_main:
            counts = class_counts(setup.partition, setup.dataset.train.labels, setup.dataset.num_classes, MAX_CLIENTS)
            log.write_setting(counts, setup.partition.num_clients, setup.dataset.class_names)
            if note := simulation.participation.describe():
                log.note(note)
            if setup.start.note and state.round == 0:
                log.note(setup.start.note)
            if setup.quantized_weights:
                whole = setup.model.backbone.num_parameters
                log.note(f"{setup.quantized_weights:,} of {whole:,} parameters are frozen and kept in 8 bits")
            for note in (*setup.sharding_notes, *setup.cache_notes):
                log.note(note)
            if simulation.compile_seconds is not None:
                log.note(f"compiled in {simulation.compile_seconds:.1f} s")
            plan = simulation.privacy_plan
            figures = None if plan is None else plan.figures(simulation.num_rounds)
            for line in describe_privacy(config.privacy, figures, None if plan is None else plan.warning):
                log.note(line)
        yield log


def _finish(state: State, opened: OpenRun, runtime: Runtime) -> str:
    """Leaves the directory complete, or interrupted if rounds are left."""
    simulation, directory = opened.simulation, opened.directory
    outcome = COMPLETE if state.round >= simulation.num_rounds else INTERRUPTED
    if outcome == COMPLETE:
        if state.totals.get("evaluated_round") != state.round:  # a round that was not to be the last one
            evaluation = simulation.setup.evaluate(state.vector)
            state = replace(state, totals=add_evaluation(state.totals, evaluation, state.round))
        if runtime.is_main:
            write_result(state, simulation, directory)
    elif opened.is_ours():
        opened.save(state)
        if runtime.is_main:  # the launch's name lets a restarted worker leave the run stopped
            directory.write_state(INTERRUPTED, state.round, runtime.launch.job)
    elif runtime.is_main:
        print(f"{directory.path}: taken over by {directory.owner()}", flush=True)
    barrier(runtime)
    return outcome


@contextmanager
def _marking_failures(opened: OpenRun, runtime: Runtime) -> Iterator[None]:
    """Writes into state.json why the run failed, also if another rank fails first."""
    if runtime.peers is not None:
        runtime.peers.last_will = opened.mark_failed
    try:
        yield
    except StoppedEarlyError:
        raise
    except BaseException as error:
        opened.mark_failed(one_line(_full_disk(error, opened.simulation.config) or error))
        raise


@contextmanager
def _telling_full_disk(config: RunConfig) -> Iterator[None]:
    """Turns a full disk into the user's mistake."""
    try:
        yield
    except OSError as error:
        if full := _full_disk(error, config):
            raise full from error
        raise


def _full_disk(error: BaseException, config: RunConfig) -> ConfigError | None:
    if not isinstance(error, OSError) or error.errno not in DISK_FULL:
        return None
    place = error.filename or Path(config.output.root) / config.output.name
    return ConfigError(
        f"{place}: cannot be written ({error.strerror}); make room, then run the same command to go on from the newest "
        "checkpoint"
    )
