"""Opening a run while other processes write to its directory, and under launchers that start it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpeft_dist.config.errors import ConfigError
from fedpeft_dist.config.load import parse_config, with_values
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation import opening, rounds
from fedpeft_dist.federation.opening import open_run
from fedpeft_dist.runtime.process import Launch, Runtime, find_launch
from fedpeft_dist.tracking.run_directory import COMPLETE, INTERRUPTED, RUNNING, RunDirectory
from tests.numerics.cases import make_runtime


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    tree = {
        "backbone": {
            "name": "vit_tiny_patch16_224",
            "pretrained": False,
            "model_args": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        },
        "method": {"name": "head"},
        "data": {"name": "digits", "image_size": 16, "clients": 4, "partition": {"name": "iid"}},
        "federation": {"rounds": 1, "cohort": 2},
        "runtime": {"device": "cpu", "precision": "fp32", "lanes": 2},
        "output": {"root": str(tmp_path), "name": "run"},
    }
    return parse_config(tree, "test")


def directory_of(config: RunConfig) -> RunDirectory:
    return RunDirectory(Path(config.output.root) / config.output.name)


def while_building(monkeypatch: pytest.MonkeyPatch, happens: Any) -> None:
    """Lets something happen between the first look at the directory and the lock."""
    build = opening.Simulation

    def building(config: RunConfig, runtime: Runtime) -> Any:
        simulation = build(config, runtime)
        happens()
        return simulation

    monkeypatch.setattr(opening, "Simulation", building)


def test_another_runs_files_that_appear_meanwhile_are_refused(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(config)

    def another_begins() -> None:
        directory.write_config(config.model_copy(update={"seed": 9}))
        directory.write_state(INTERRUPTED, 1)

    while_building(monkeypatch, another_begins)
    with pytest.raises(ConfigError, match=r"holds a run of another config: seed \(9 there, 1 here\)"):
        open_run(config, make_runtime())
    assert not directory.in_use()


def test_what_another_process_has_completed_meanwhile_is_not_run_again(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(config)

    def another_completes() -> None:
        directory.write_config(config)
        directory.write_state(COMPLETE, 1)

    while_building(monkeypatch, another_completes)
    assert open_run(config, make_runtime()) is None
    assert not directory.in_use()


def test_lanes_that_another_process_has_chosen_meanwhile_are_kept(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(config)

    def another_begins() -> None:
        directory.write_config(with_values(config, "runtime", lanes=1))
        directory.write_state(INTERRUPTED, 0)

    while_building(monkeypatch, another_begins)
    run = open_run(with_values(config, "runtime", lanes="auto"), make_runtime())
    assert run.config.runtime.lanes == run.simulation.lanes == 1
    run.close()


def test_a_failure_before_the_lock_does_not_mark_another_processs_run(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(config)
    directory.write_config(config)
    directory.write_state(RUNNING, 0)

    def fail() -> None:
        raise MemoryError

    while_building(monkeypatch, fail)
    with pytest.raises(MemoryError):
        rounds.run_federation(config, make_runtime())
    assert directory.read_state()["state"] == RUNNING


def test_a_run_does_not_go_on_with_other_data(config: RunConfig) -> None:
    config = with_values(config, "federation", rounds=2)
    run = open_run(config, make_runtime())
    run.directory.write_config(config)
    run.next_round = 1
    run.save()
    run.close()
    other = with_values(config, "data", root="elsewhere")
    again = open_run(other, make_runtime())  # where files lie does not matter, what they hold does
    assert again.next_round == 1
    again.close()
    opening_digits = opening.Simulation

    def with_a_changed_label(config: RunConfig, runtime: Runtime) -> Any:
        simulation = opening_digits(config, runtime)
        simulation.dataset.train.labels[0] += 1
        simulation.data_sha256 = simulation.dataset.fingerprint()
        return simulation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "Simulation", with_a_changed_label)
        with pytest.raises(ConfigError, match="was begun on other data"):
            open_run(config, make_runtime())


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
    run = open_run(config, Runtime(launch, make_runtime().device, "fp32", threads=1))
    assert run is not None
    run.close()


def test_a_worker_that_torchrun_restarts_does_not_undo_an_interruption(config: RunConfig) -> None:
    directory = directory_of(config)
    directory.write_config(config)
    directory.write_state(INTERRUPTED, 0, "job")
    device = make_runtime().device
    assert open_run(config, Runtime(Launch(restart=1, job="job"), device, "fp32", threads=1)) is None
    run = open_run(config, Runtime(Launch(restart=0, job="other"), device, "fp32", threads=1))
    assert run is not None
    run.close()
