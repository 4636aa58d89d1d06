"""Opening a run while other processes write to its directory, and under launchers that start it again."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from fedpeft_dist.checkpoint import load_newest_checkpoint
from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import parse_config, with_values
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation import opening, setup
from fedpeft_dist.federation.evaluation import Evaluator
from fedpeft_dist.federation.opening import OpenRun, open_run
from fedpeft_dist.federation.run import run
from fedpeft_dist.federation.setup import Setup
from fedpeft_dist.runtime import interrupts
from fedpeft_dist.runtime.interrupts import StopRequest
from fedpeft_dist.runtime.launch import Launch, find_launch
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.tracking.run_directory import (
    COMPLETE,
    FAILED,
    INTERRUPTED,
    RUNNING,
    RunDirectory,
    read_metrics,
)
from fedpeft_dist.tracking.run_lock import RunInUseError
from fedpeft_dist.training.trainer import RoundStart, Trainer
from tests.numerics.cases import make_runtime
from tests.tiny import tiny_vit


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    tree = {
        "backbone": tiny_vit(),
        "method": {"name": "head"},
        "data": {"name": "digits", "image_size": 16, "clients": 4, "partition": {"name": "iid"}},
        "federation": {"rounds": 1, "cohort": 2},
        "runtime": {"device": "cpu", "precision": "fp32", "lanes": 2},
        "output": {"root": str(tmp_path), "name": "run"},
    }
    return parse_config(tree, "test")


def directory_of(config: RunConfig) -> RunDirectory:
    return RunDirectory(Path(config.output.root) / config.output.name)


def begin(config: RunConfig, runtime: Runtime | None = None) -> AbstractContextManager[OpenRun | None]:
    return open_run(config, runtime or make_runtime(), StopRequest())


def test_directory_is_locked_before_anything_is_built(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """So nothing can change in the directory between the reading and the first round."""
    load, refusals = setup.load_dataset, []

    def load_while_another_begins(*arguments: Any) -> Any:
        with pytest.raises(RunInUseError) as refusal, begin(config):
            pass
        refusals.append(refusal)
        return load(*arguments)

    monkeypatch.setattr(setup, "load_dataset", load_while_another_begins)
    with begin(config) as opened:
        assert opened.state.round == 0
    assert len(refusals) == 1


@pytest.mark.parametrize("inside", ["", "group"])
def test_refused_config_leaves_no_file(config: RunConfig, tmp_path: Path, inside: str) -> None:
    refused = with_values(config, "output", root=str(tmp_path / inside), name="new/run")
    refused = with_values(refused, "data", max_train=10**6)
    with pytest.raises(ConfigError, match="max_train"), begin(refused):
        pass
    assert list(tmp_path.iterdir()) == []


def test_refused_config_leaves_the_files_of_others(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="max_train"), begin(with_values(config, "data", max_train=10**6)):
        pass
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert not directory_of(config).in_use()


def test_another_runs_directory_is_refused(config: RunConfig) -> None:
    directory = directory_of(config)
    directory.path.mkdir()
    directory.write_config(config.model_copy(update={"seed": 9}))
    directory.write_state(INTERRUPTED, 1)
    with pytest.raises(ConfigError, match=r"holds a run of another config: seed \(9 there, 1 here\)"), begin(config):
        pass
    assert not directory.in_use()


def test_complete_run_is_not_run_again(config: RunConfig) -> None:
    directory = directory_of(config)
    directory.write_config(config)
    directory.write_state(COMPLETE, 1)
    directory.checkpoints.mkdir()
    (directory.checkpoints / "round-000001.safetensors").write_bytes(b"of another version")
    with begin(config) as opened:
        assert opened is None
    assert not directory.in_use()


def test_complete_run_may_lie_in_a_read_only_place(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = directory_of(config)
    directory.write_config(config)
    directory.write_state(COMPLETE, 1)

    def refuse(self: RunDirectory) -> None:
        raise ConfigError("output.root: no run can be written")

    monkeypatch.setattr(RunDirectory, "check_writable", refuse)
    with begin(config) as opened:
        assert opened is None
    with pytest.raises(ConfigError, match="no run can be written"), begin(with_values(config, "federation", rounds=2)):
        pass


def test_run_keeps_the_lanes_that_it_has_begun_with(config: RunConfig) -> None:
    directory = directory_of(config)
    directory.write_config(with_values(config, "runtime", lanes=1))
    directory.write_state(INTERRUPTED, 0)
    with begin(with_values(config, "runtime", lanes="auto")) as opened:
        assert opened.simulation.config.runtime.lanes == 1


def test_failure_while_building_does_not_mark_the_run_failed(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(config)
    directory.write_config(config)
    directory.write_state(RUNNING, 0)

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(setup, "load_dataset", fail)
    with pytest.raises(MemoryError):
        run(config, runtime=make_runtime())
    assert directory.read_state()["state"] == RUNNING


def test_run_does_not_go_on_with_other_data(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_values(config, "federation", rounds=2)
    with begin(config) as opened:
        opened.directory.write_config(config)
        opened.save(dataclasses.replace(opened.state, round=1))
    other = with_values(config, "data", root="elsewhere")
    with begin(other) as opened:  # the place of the files does not matter, their content does
        assert opened.state.round == 1
    load = setup.load_dataset

    def load_with_a_changed_label(*arguments: Any) -> Any:
        dataset = load(*arguments)
        dataset.train.labels[0] += 1
        return dataset

    monkeypatch.setattr(setup, "load_dataset", load_with_a_changed_label)
    with pytest.raises(ConfigError, match="was begun on other data"), begin(config):
        pass


def test_a_job_that_slurm_has_requeued_goes_on(config: RunConfig) -> None:
    directory = directory_of(config)
    directory.write_config(config)
    directory.write_state(INTERRUPTED, 0, "")
    slurm = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_RESTART_COUNT": "1",
        "MASTER_ADDR": "localhost",
    }
    launch = find_launch(slurm)
    assert (launch.restart, launch.requeues) == (0, 1)
    with begin(config, Runtime(launch, make_runtime().device, "fp32", threads=1)) as opened:
        assert opened is not None


def test_a_worker_that_torchrun_restarts_does_not_undo_an_interruption(config: RunConfig) -> None:
    directory = directory_of(config)
    directory.write_config(config)
    directory.write_state(INTERRUPTED, 0, "job")
    device = make_runtime().device
    with begin(config, Runtime(Launch(restart=1, job="job"), device, "fp32", threads=1)) as opened:
        assert opened is None
    with begin(config, Runtime(Launch(restart=0, job="other"), device, "fp32", threads=1)) as opened:
        assert opened is not None


def run_some_rounds(config: RunConfig, num_rounds: int) -> None:
    run(with_values(config, "federation", rounds=num_rounds), runtime=make_runtime())


def digest_of(config: RunConfig) -> str:
    return json.loads(directory_of(config).summary_file.read_text())["weights_sha256"]


@pytest.mark.parametrize("num_damaged", [1, 2])
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(
    config: RunConfig, capsys: pytest.CaptureFixture[str], num_damaged: int
) -> None:
    other = with_values(config, "output", name="other")
    run_some_rounds(config, 5)
    run_some_rounds(other, 3)
    directory = directory_of(other)
    paths = [directory.checkpoints / f"round-00000{n}.safetensors" for n in (3, 2)][:num_damaged]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    run_some_rounds(other, 5)
    told = capsys.readouterr().err.splitlines()
    where = "the one before" if num_damaged == 1 else "the beginning"
    assert [line for line in told if "damaged" in line] == [
        f"{path}: a damaged checkpoint (its content does not match its digest); going on from {where}" for path in paths
    ]
    assert digest_of(other) == digest_of(config)
    names = sorted(path.name for path in directory.checkpoints.iterdir())
    assert names == [
        *(f"damaged-{path.name}" for path in reversed(paths)),
        "round-000004.safetensors",
        "round-000005.safetensors",
    ]
    rows = [json.loads(line)["round"] for line in directory.metrics_file.read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5]


def test_a_checkpoint_of_another_config_is_refused(config: RunConfig) -> None:
    """Also where config.yaml has been edited to match."""
    run_some_rounds(config, 1)
    other = config.model_copy(update={"seed": 9})
    directory_of(config).write_config(other)
    with pytest.raises(ConfigError, match=r"holds a run of another config: seed \(1 there, 9 here\)"):
        run_some_rounds(other, 2)


def test_other_versions_of_libraries_are_told(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_some_rounds(config, 1)
    now = opening.library_versions()
    monkeypatch.setattr(opening, "library_versions", lambda: now | {"torch": "9.9"})
    run_some_rounds(config, 2)
    assert f"begun with other versions (torch {now['torch']} there, 9.9 here)" in capsys.readouterr().err


def in_round(monkeypatch: pytest.MonkeyPatch, number: int, happens: Callable[[], None]) -> None:
    """Lets something happen at the beginning of a round, counted from 0."""
    train = Trainer.train

    def training(trainer: Trainer, tasks: Any, start: RoundStart, *others: Any) -> Any:
        if start.number == number:
            happens()
        return train(trainer, tasks, start, *others)

    monkeypatch.setattr(Trainer, "train", training)


@pytest.mark.parametrize(("grace", "rounds_done"), [(1000.0, 3), (-1.0, 2)])
@pytest.mark.parametrize("checkpoint_every", [1, 0])
def test_a_round_in_work_is_finished_in_time_or_dropped(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, grace: float, rounds_done: int, checkpoint_every: int
) -> None:
    other = with_values(config, "output", name="other", checkpoint_every=checkpoint_every)
    config, other = (with_values(each, "federation", rounds=5) for each in (config, other))
    run(config, runtime=make_runtime())
    with monkeypatch.context() as patch:
        stop = StopRequest()
        patch.setattr(interrupts, "GRACE_SECONDS", grace)
        in_round(patch, 2, lambda: setattr(stop, "received", True))
        assert run(other, stop, make_runtime()) == INTERRUPTED
    directory = directory_of(other)
    assert directory.read_state() == {"state": INTERRUPTED, "next_round": rounds_done, "launch": ""}
    newest, damaged = load_newest_checkpoint(directory.checkpoints)
    assert (newest.state.round, damaged) == (rounds_done, [])
    assert run(other, runtime=make_runtime()) == COMPLETE
    assert digest_of(other) == digest_of(config)


def test_a_run_that_is_stopped_before_its_first_round(config: RunConfig) -> None:
    assert run(config, StopRequest(received=True), make_runtime()) == INTERRUPTED
    assert directory_of(config).read_state() == {"state": INTERRUPTED, "next_round": 0, "launch": ""}
    assert run(config, runtime=make_runtime()) == COMPLETE


def test_what_takes_long_before_the_first_round_is_broken_off(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            time.sleep(60)
        except Exception:  # not what a library may catch
            pytest.fail("caught")

    def decode_quickly(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return load(*arguments)

    load = setup.load_dataset
    monkeypatch.setattr(interrupts, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(setup, "load_dataset", decode)
    assert run(config, runtime=make_runtime()) == INTERRUPTED
    assert not directory_of(config).path.exists()
    monkeypatch.undo()
    monkeypatch.setattr(setup, "load_dataset", decode_quickly)
    assert run(config, runtime=make_runtime()) == INTERRUPTED
    assert directory_of(config).read_state()["state"] == INTERRUPTED
    monkeypatch.undo()
    assert run(config, runtime=make_runtime()) == COMPLETE


@pytest.mark.parametrize("privacy", [{}, {"name": "user", "clip_norm": 0.5, "noise_multiplier": 0.1, "adaptive": {}}])
def test_a_round_whose_evaluation_takes_long_is_dropped_and_leaves_no_trace(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, privacy: dict[str, Any]
) -> None:
    """In the server's optimizer, in a clipping norm that adapts, in what is logged; with a checkpoint after each round
    or none but the last."""
    tree = config.model_dump(mode="json") | {"server": {"optimizer": {"name": "yogi"}}}
    if privacy:
        tree |= {"privacy": privacy}
        tree["federation"] |= {"participation": {"name": "poisson"}}
    whole = with_values(with_values(parse_config(tree, "test"), "federation", rounds=4), "runtime", evaluate_batch=100)
    assert run(whole, runtime=make_runtime()) == COMPLETE
    for every in (1, 0):
        other = with_values(whole, "output", name=f"every{every}", checkpoint_every=every)
        stop, batch, starts = StopRequest(), Evaluator._batch, []

        def evaluate_batch(evaluator: Any, start: int, *others: Any, stop=stop, batch=batch, starts=starts) -> Any:
            starts.append(start)
            stop.received = starts.count(100) == 3  # the second batch in the third round
            return batch(evaluator, start, *others)

        with monkeypatch.context() as patch:
            patch.setattr(interrupts, "GRACE_SECONDS", -1.0)
            patch.setattr(Evaluator, "_batch", evaluate_batch)
            assert run(other, stop, make_runtime()) == INTERRUPTED
        directory = directory_of(other)
        assert (directory.read_state()["next_round"], len(read_metrics(directory.metrics_file))) == (2, 2)
        assert run(other, runtime=make_runtime()) == COMPLETE
        assert digest_of(other) == digest_of(whole)


def test_no_round_begins_after_a_request_that_came_during_an_evaluation(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, stop = Setup.evaluate, StopRequest()

    def evaluate_long(*arguments: object) -> dict[str, float]:
        stop.received = True
        return evaluate(*arguments)

    longer = with_values(config, "federation", rounds=5)
    monkeypatch.setattr(Setup, "evaluate", evaluate_long)
    assert run(longer, stop, make_runtime()) == INTERRUPTED
    assert directory_of(config).read_state()["next_round"] == 1


def test_a_run_that_another_attempt_takes_over_writes_nothing_more(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_values(config, "federation", rounds=5)
    directory, seen = directory_of(config), []

    def take_over() -> None:
        claim = dataclasses.replace(directory.owner(), attempt=1, token="new")
        (directory.path / "owner.json").write_text(json.dumps(dataclasses.asdict(claim)))
        seen.extend(path.read_bytes() for path in sorted(directory.path.rglob("*")) if path.is_file())

    in_round(monkeypatch, 2, take_over)
    assert run(config, runtime=make_runtime()) == INTERRUPTED
    files = [path for path in sorted(directory.path.rglob("*")) if path.is_file()]
    events = [path.name.startswith("events") for path in files]
    for before, path, is_events in zip(seen, files, events):
        assert is_events or path.read_bytes() == before, path
    assert not directory.in_use()
    assert directory.owner().token == "new"


def test_a_failure_is_told_in_the_state(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MemoryError("out of\nmemory")

    in_round(monkeypatch, 1, fail)
    with pytest.raises(MemoryError):
        run_some_rounds(config, 3)
    state = directory_of(config).read_state()
    assert state == {"state": FAILED, "next_round": 1, "launch": "", "error": "out of memory"}
